import json
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.errors import PipelineError
from pipeline.perf import ingest_peers, photographs
from pipeline.perf.ingest_peers import Img2Dataset

NUM_IMAGES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    photographs.draw(folder, NUM_IMAGES, quality=50)
    return folder


def captions_of(images: Path) -> dict[str, str]:
    return {path.name: f"about {path.stem}" for path in ingest_peers.image_files(images)}


def test_tar_holds_the_images_and_nothing_else(images: Path, tmp_path: Path) -> None:
    assert ingest_peers.tar_version() is not None
    ingest_peers.tar(images, tmp_path / "all.tar")
    with tarfile.open(tmp_path / "all.tar") as tar:
        assert tar.getnames() == [path.name for path in ingest_peers.image_files(images)]


def test_both_writers_of_shards_write_every_image_with_its_caption(
    images: Path, tmp_path: Path
) -> None:
    captions = captions_of(images)
    ingest_peers.shard_writer(images, captions, tmp_path / "theirs")
    ingest_peers.bare_shards(images, captions, tmp_path / "ours")
    for folder, part in (("theirs", "txt"), ("ours", "json")):
        (tar,) = (tmp_path / folder).glob("*.tar")
        samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [
            path.stem for path in ingest_peers.image_files(images)
        ]
        for sample in samples:
            name = f"{sample['__key__']}.jpg"
            assert sample["jpg"] == (images / name).read_bytes()
            words = sample[part].decode()
            assert captions[name] in (words if part == "txt" else json.loads(words)["captions"])


def test_an_absent_img2dataset_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert Img2Dataset.find(None) is None


@pytest.mark.processes
def test_a_command_that_is_not_img2dataset_is_named(tmp_path: Path) -> None:
    command = tmp_path / "img2dataset"
    command.write_text(f"#!{sys.executable}\n")
    with pytest.raises(PipelineError, match="no img2dataset"):
        Img2Dataset.find(str(command))
