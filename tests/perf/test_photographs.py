import json
from pathlib import Path

from PIL import Image

from pipeline.perf import photographs


def test_files_are_different_jpegs_with_a_caption_each(tmp_path: Path) -> None:
    photographs.draw(tmp_path, 3, quality=88)
    files = sorted(tmp_path.glob("*.jpg"))
    assert len({path.read_bytes() for path in files}) == 3
    for path in files:
        assert 50_000 < path.stat().st_size < 70_000
        assert Image.open(path).size == (photographs.WIDTH, photographs.HEIGHT)
    document = json.loads((tmp_path / "captions.json").read_text())
    assert [image["file_name"] for image in document["images"]] == [path.name for path in files]
    assert {caption["image_id"] for caption in document["annotations"]} == {0, 1, 2}


def test_the_same_files_are_drawn_each_time(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        photographs.draw(tmp_path / folder, 2, quality=50)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
