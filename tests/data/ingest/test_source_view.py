from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.source_view import FingerprintOf, SourceView
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.sources.base import Record, Reject, Source
from pipeline.errors import SourceError
from tests.data.album import Album, encoded, picture
from tests.data.world import Item, World


def album(num_files: int = 3) -> Album:
    return Album({f"key-{n}": encoded(picture(n)) for n in range(num_files)})


def listed(
    source: Source, policy: ImagePolicy | None = None, fingerprint: FingerprintOf = "metadata"
) -> list[Record | Reject]:
    return list(SourceView(source, policy or ImagePolicy(), fingerprint).records())


def test_by_default_the_records_are_the_sources_own() -> None:
    assert listed(album()) == list(album().records())


def test_an_image_policy_changes_what_tells_images_apart_and_leaves_the_texts() -> None:
    plain = listed(album())
    small = listed(album(), ImagePolicy(reencode=ReencodeConfig(shorter_side=8)))
    for before, after in zip(plain, small, strict=True):
        assert isinstance(after, Record)
        assert before.image_fingerprint != after.image_fingerprint
        assert before.texts_fingerprint == after.texts_fingerprint
        assert after.suffix == "jpg"
    assert small == listed(album(), ImagePolicy(reencode=ReencodeConfig(shorter_side=8)))


def test_captions_are_filtered_here() -> None:
    source = album()
    source.captions = {"key-0": ("a", "a dog runs"), "key-1": ("a",)}
    entries = listed(source, ImagePolicy(filters=FilterConfig(min_caption_words=2)))
    assert isinstance(entries[0], Record)
    assert entries[0].texts.decode().captions == ("a dog runs",)
    assert isinstance(entries[1], Reject)
    assert entries[2] == listed(album())[2]


def test_content_is_told_apart_by_bytes_alone() -> None:
    source, touched = album(100), album(100)
    touched.metadata = {"key-1": "another time"}
    by_content = listed(source, fingerprint="content")
    assert [entry.key for entry in by_content] == list(source.files)
    assert listed(touched, fingerprint="content") == by_content
    touched.files["key-1"] = encoded(picture(1000))
    different = listed(touched, fingerprint="content")
    pairs = zip(by_content, different, strict=True)
    assert [a.key for a, b in pairs if a.image_fingerprint != b.image_fingerprint] == ["key-1"]


def test_an_image_that_cannot_be_had_is_listed_by_its_metadata() -> None:
    class Gone(Album):
        def read(self, record: Record) -> bytes:
            raise SourceError(f"{record.image}: vanished")

    source = Gone(album().files)
    assert listed(source, fingerprint="content") == listed(source)
    rejects = World({"a": Item(1, "x", fault="missing-image")})
    assert listed(rejects, fingerprint="content") == listed(rejects)
