import gzip
import io
import subprocess
import tarfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.tars.tar_listing import TarMember, list_tar
from pipeline.errors import SourceError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
MEMBERS = [("a.jpg", b"J" * 700), ("a.txt", b"words"), ("b.jpg", b""), ("b.txt", b"x" * 512)]


def packed(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, payload in members:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return file.getvalue()


def members(tar: bytes) -> list[TarMember]:
    return list(list_tar(io.BytesIO(tar), "t.tar"))


def contents(tar: bytes) -> list[tuple[str, bytes]]:
    return [(each.name, tar[each.offset : each.offset + each.size]) for each in members(tar)]


WHOLE = packed(MEMBERS)
END = WHOLE.rindex(b"x") + 1  # the last payload fills its block


@pytest.mark.parametrize("form", FORMATS)
@given(
    files=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
            .map(lambda name: name.strip("/"))
            .filter(bool)
            .filter(lambda name: len(name.encode()) <= 90),
            st.binary(max_size=1100),
        ),
        max_size=5,
    )
)
def test_every_file_is_found_at_its_place(files: list[tuple[str, bytes]], form: int) -> None:
    assert contents(packed(files, form)) == files


@pytest.mark.parametrize("form", FORMATS[1:])
def test_long_names_are_read_whole(form: int) -> None:
    files = [(f"{'folder/' * 40}{number}.jpg", b"J") for number in range(2)]
    assert contents(packed(files, form)) == files
    prefixed = [(f"{'folder/' * 20}{number}.jpg", b"J") for number in range(2)]
    assert contents(packed(prefixed, tarfile.USTAR_FORMAT)) == prefixed


def pack(tar: Path, *arguments: str) -> None:
    subprocess.run(["tar", "-cf", str(tar), *arguments], check=True)


def test_what_the_tar_of_the_system_packs_is_read(tmp_path: Path) -> None:
    names = ["0.jpg", f"{'n' * 150}.jpg", f"{'d' * 90}/{'e' * 90}.txt"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    tar = tmp_path / "t.tar"
    for form in ("gnu", "oldgnu", "pax", "posix"):
        tar = tmp_path / "t.tar"
        command = [
            "tar",
            "-cf",
            str(tar),
            f"--format={form}",
            "--sort=name",
            "-C",
            str(tmp_path / "in"),
            ".",
        ]
        subprocess.run(command, check=True)
        found = {
            name.removeprefix("./"): text.decode() for name, text in contents(tar.read_bytes())
        }
        assert found == {name: name for name in names}
    pack(tar, "--format=v7", "-C", str(tmp_path / "in"), "0.jpg", "0.jpg")
    assert [name for name, _ in contents(tar.read_bytes())] == ["0.jpg", "0.jpg"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_bit_of_a_header_is_found_or_changes_nothing(form: int) -> None:
    tar = packed([*MEMBERS, ("n" * 120 + ".txt", b"x")][: 4 if form == FORMATS[0] else 5], form)
    whole = contents(tar)
    headers = {each.offset - 512 for each in members(tar)}
    found = 0
    for start in sorted(headers):
        for bit in range(512 * 8):
            damaged = bytearray(tar)
            damaged[start + bit // 8] ^= 1 << bit % 8
            try:
                assert contents(bytes(damaged)) == whole, (start, bit)
            except SourceError:
                found += 1
    assert found > 0.99 * len(headers) * 504 * 8  # all but padding of the checksum's field


def test_damage_of_any_kind_never_loses_a_member_quietly() -> None:
    for seed in range(300):
        random = Random(seed)
        damaged = bytearray(WHOLE)
        kind = random.choice(["cut", "zero", "noise", "drop", "insert"])
        at, length = random.randrange(END), random.randrange(1, 1500)
        if kind == "cut":
            del damaged[at:]
        elif kind == "zero":  # a header, as a lost page of a disk
            headers = [each.offset - 512 for each in members(WHOLE)]
            at = random.choice(headers)
            damaged[at : at + 512] = bytes(512)
        elif kind == "noise":
            damaged[at : at + length] = random.randbytes(length)
        elif kind == "drop":
            del damaged[at : at + length]
        else:
            damaged[at:at] = random.randbytes(length)
        try:
            found = [(each.name, each.size) for each in members(bytes(damaged))]
        except SourceError:
            continue
        # Only payloads are damaged, for which a tar has no checksum.
        assert found == [(name, len(payload)) for name, payload in MEMBERS], f"seed {seed}"


def test_every_cut_is_found() -> None:
    for size in range(END + 1024):
        with pytest.raises(SourceError, match=r"t\.tar: not a plain tar, or cut short: at byte"):
            members(WHOLE[:size])
    assert [each.name for each in members(WHOLE[: END + 1024])] == [name for name, _ in MEMBERS]


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (b"", "at byte 0, found the end of the file"),
        (WHOLE + WHOLE, r"the header of another member behind the zeros.*--ignore-zeros"),
        (WHOLE[:END] + WHOLE, None),  # appended to a tar without its end, which is a whole one
        (WHOLE[: END + 1024] + b"garbage", r"found b'garbage' behind the zeros"),
        (WHOLE + bytes(3_000_000) + b"g", r"found b'g' behind the zeros"),
        (WHOLE[:END], "before the two blocks of zeros that end a tar"),
        (WHOLE[: END + 512], "one block of zeros and the end of the file"),
        (gzip.compress(WHOLE), "not a plain tar, but one packed by gzip.*unpack it first"),
        (b"PK\x03\x04", "packed by ZIP"),
        (b"\xff\xd8\xff" * 900, "where a member's header should be"),
        (bytes(10240), None),
        (WHOLE + bytes(5_000_000), None),
        (WHOLE[: END + 1025], None),  # zeros beyond the last whole block
    ],
)
def test_a_tar_ends_with_zeros_and_nothing_else(tar: bytes, message: str | None) -> None:
    if message is None:
        assert {name for name, _ in contents(tar)} <= {name for name, _ in MEMBERS}
        return
    with pytest.raises(SourceError, match=message):
        members(tar)


def test_a_name_that_begins_like_a_packed_file_does_not_make_it_one() -> None:
    for name in ("BZh9.jpg", "PK\3\4.jpg"):
        assert contents(packed([(name, b"J")])) == [(name, b"J")]


def test_links_devices_and_sparse_files_say_why_they_cannot_be_read() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (
            ("folder", tarfile.DIRTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("device.jpg", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
    found = {each.name: each.fault and each.fault[0] for each in members(file.getvalue())}
    assert found == dict.fromkeys(
        ["hard.jpg", "soft.jpg", "pipe.jpg", "device.jpg"], "special-file"
    )


@pytest.mark.parametrize("form", ["gnu", "posix", "posix --sparse-version=0.1", "posix --sparse-version=0.0"])  # fmt: skip  # noqa: E501
def test_sparse_files_are_told(tmp_path: Path, form: str) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        for piece in range(40):  # more than fit into the header
            file.seek(piece * 100_000)
            file.write(b"J" * 5000)
    (tmp_path / "z.txt").write_bytes(b"words")
    command = f"tar -cf t.tar --sparse --format={form} holes.jpg z.txt"
    subprocess.run(command.split(), check=True, cwd=tmp_path)
    first, second = members((tmp_path / "t.tar").read_bytes())
    assert (first.name, first.fault and first.fault[0]) == ("holes.jpg", "sparse-member")
    assert (second.name, second.fault, second.size) == ("z.txt", None, 5)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header as old tars have them, by hand."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[148:156], block[156:157] = b" " * 8, kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_old_headers_and_sizes_in_base_256_are_read() -> None:
    size = b"\x80" + (5).to_bytes(11, "big")
    tar = (
        header(b"folder/", b"0", b"\0")
        + header(b"a.txt", b"     5 ", b"\0")
        + b"words".ljust(512, b"\0")
        + header(b"b.txt", size)
        + b"other".ljust(512, b"\0")
        + bytes(1024)
    )
    assert contents(tar) == [("a.txt", b"words"), ("b.txt", b"other")]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"\x80" + b"\xff" * 11, "bytes, of which the file has 1024"),
        (b"\xff" * 12, "where a member's header should be"),
        (b"77777777777", "of which the file has 1024"),
        (b"-0000000005", "where a member's header should be"),
        (b"0000000000_5", "where a member's header should be"),
    ],
)
def test_a_size_that_cannot_be_is_found(size: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        members(header(b"a.jpg", size) + bytes(1024))


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (b"x", b"19 path=a"),
        (b"x", b"99999 path=a\n"),
        (b"x", b"11 path\xff=a\n"[:10]),
        (b"x", b"0 path=a\n"),
        (b"x", b"12 size=abc\n"),
        (b"L", None),
    ],
)
def test_extended_headers_are_taken_at_their_word_or_refused(
    kind: bytes, payload: bytes | None
) -> None:
    size = b"%o" % (1 << 31 if payload is None else len(payload))
    tar = header(b"x", size, kind) + (payload or b"").ljust(512, b"\0")
    with pytest.raises(SourceError, match="at byte"):
        members(tar + header(b"b.jpg", b"0") + bytes(1024))


def test_an_extended_header_without_a_member_is_found() -> None:
    tar = header(b"x", b"13", b"x") + b"11 path=ab\n".ljust(512, b"\0") + bytes(1024)
    with pytest.raises(SourceError, match="an extended header without its member"):
        members(tar)


def test_a_name_may_have_any_bytes() -> None:
    ((name, _),) = contents(packed([("caf\udce9.jpg", b"J")], tarfile.GNU_FORMAT))
    assert name == "caf\udce9.jpg"
