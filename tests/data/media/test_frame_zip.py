import io
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable

import pytest

from pipeline.data.media.frame_zip import MOST_FRAME_BYTES, FrameZip
from pipeline.data.media.image_check import BadImageError
from tests.vision.photo_dataset import picture


def zipped(files: list[tuple[str, bytes]], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, payload in files:
            archive.writestr(name, payload)
    return buffer.getvalue()


def bomb(num_bytes: int, stated: int | None = None, name: bytes = b"0.bmp") -> bytes:
    """A ZIP of one member of zeros, packed a megabyte at a time; it may state another size."""
    block = bytes(1024**2)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    count = num_bytes // len(block)
    body = piece * count + packer.flush(zlib.Z_FINISH)
    crc = 0
    for _ in range(count if stated is None else 0):
        crc = zlib.crc32(block, crc)
    sizes = struct.pack("<III", crc, len(body), num_bytes if stated is None else stated)
    names = struct.pack("<HH", len(name), 0)
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes + names + name
    entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes + names
    entry += struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    place = len(local) + len(body)
    return (
        local + body + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), place, 0)
    )


def reason(payload: bytes) -> str:
    with pytest.raises(BadImageError) as error, FrameZip(payload) as frames:
        for place in range(len(frames)):
            frames.read(place)
    assert error.value.detail
    error.value.detail.encode()
    return error.value.reason


def test_frames_come_in_the_order_of_their_numbers_without_what_macs_add() -> None:
    files = [(f"clip/{number}.jpg", b"%d" % number) for number in range(1, 13)]
    files += [(f"__MACOSX/clip/._{number}.jpg", b"no") for number in range(1, 13)]
    files += [("clip/.DS_Store", b"no"), ("clip/", b"")]
    for seed in range(5):
        payload = zipped(random.Random(seed).sample(files, len(files)))
        with FrameZip(payload) as frames:
            found = [(frames.name(place), frames.read(place)) for place in range(len(frames))]
        assert found == files[:12]


def test_a_frame_may_be_without_a_name() -> None:
    payload = zipped([("_", b"1"), ("b", b"2")]).replace(b"_", b"\0")  # where names end
    with FrameZip(payload) as frames:
        assert [(frames.name(place), frames.read(place)) for place in range(2)] == [
            ("", b"1"),
            ("b", b"2"),
        ]


def test_frames_of_one_name_are_two_frames() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        payload = zipped([("a.jpg", b"1"), ("a.jpg", b"2")])
    with FrameZip(payload) as frames:
        assert [frames.read(place) for place in range(2)] == [b"1", b"2"]


def encrypted(payload: bytes) -> bytes:
    at = payload.index(b"PK\1\2") + 8
    return payload[:6] + b"\1\0" + payload[8:at] + b"\1\0" + payload[at + 2 :]


def bad_name(payload: bytes) -> bytes:
    """States UTF-8 and holds a byte that is none."""
    at = payload.index(b"PK\1\2")
    changed = payload.replace(b"caf_", b"caf\xe9")
    return changed[: at + 8] + b"\0\x08" + changed[at + 10 :]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (zipped([]), "no-frames"),
        (zipped([("__MACOSX/._1.jpg", b"no"), ("folder/", b"")]), "no-frames"),
        (encrypted(zipped([("1.jpg", b"words")])), "undecodable-frames"),
        (bad_name(zipped([("caf_.jpg", b"words")])), "undecodable-frames"),
        (zipped([("1.jpg", b"words" * 99)], zipfile.ZIP_BZIP2), "undecodable-frames"),
        (zipped([("1.jpg", b"words" * 99)], zipfile.ZIP_LZMA), "undecodable-frames"),
        (bomb(1024**2)[:-30], "undecodable-frames"),
        (b"PK\3\4" + bytes(200), "undecodable-frames"),
        (bomb(700 * 1024**2), "oversized-frames"),
        (bomb(400 * 1024**2, stated=MOST_FRAME_BYTES + 1), "oversized-frames"),
        (bomb(4 * 1024**2, stated=99), "undecodable-frames"),
        (bomb(4 * 1024**2, stated=5 * 1024**2), "undecodable-frames"),
    ],
)  # fmt: skip
def test_what_cannot_be_unpacked_has_a_reason(payload: bytes, expected: str) -> None:
    assert reason(payload) == expected


def test_names_of_any_bytes_can_be_said() -> None:
    payload = zipped([("caf_\n.jpg", b"words" * 99)]).replace(b"caf_", b"caf\xe9")
    with FrameZip(payload) as frames:
        frames.name(0).encode()
        assert "\n" not in frames.name(0)


def test_a_flipped_bit_is_a_reason_or_changes_no_frame() -> None:
    files = [(f"{number}.png", picture(number)) for number in range(2)]
    whole = zipped(files)
    seed = 17
    for at in random.Random(seed).sample(range(len(whole) * 8), 1500):
        payload = bytearray(whole)
        payload[at // 8] ^= 1 << at % 8
        try:
            with FrameZip(bytes(payload)) as frames:
                found = [frames.read(place) for place in range(len(frames))]
        except BadImageError as error:
            assert error.reason in ("undecodable-frames", "oversized-frames", "no-frames")  # noqa: PT017
            continue
        # A name, which has no checksum, may have changed, and hide a frame.
        assert set(found) <= {frame for _, frame in files}, f"seed {seed}, bit {at}"


_MEASURE = """
import resource, sys
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.media_check import check_media
payload = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(check_media(payload, "decode"))
except BadImageError as error:
    print(error.reason)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def measured(payload: bytes) -> tuple[str, int]:
    """What is made of a payload in a process of its own, and the memory that took, in bytes."""
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, input=payload, capture_output=True, check=True)
    said, kibibytes = done.stdout.decode().split()
    return said, 1024 * int(kibibytes)


@pytest.mark.processes
@pytest.mark.parametrize(
    "make",
    [
        lambda: bomb(6 * 1024**3, stated=(1 << 32) - 1),
        lambda: bomb(2 * 1024**3, stated=2 * 1024**3 - 1),
        lambda: bomb(2 * 1024**3, stated=1000),  # says less than it holds
        lambda: bomb(2 * 1024**3, stated=200 * 1024**2),
        lambda: zipped([("a.zip", bomb(3 * 1024**3, stated=10**9))]),
    ],
)
def test_a_bomb_costs_little_memory_and_one_record(make: Callable[[], bytes]) -> None:
    payload = make()
    assert len(payload) < 10 * 1024**2
    said, added = measured(payload)
    assert said in ("oversized-frames", "undecodable-frames")
    assert added < MOST_FRAME_BYTES + 256 * 1024**2


def test_frames_that_pack_well_are_no_bomb() -> None:
    blank = b"\0" * 1_000_000
    payload = zipped([(f"{number}.bmp", blank) for number in range(200)])
    assert len(payload) < len(blank)
    with FrameZip(payload) as frames:
        assert (len(frames), frames.read(199)) == (200, blank)
