"""Lengths of captions, from files and in batches."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.perf.captions import COCO_LENGTHS, batch_lengths, read_lengths


def test_the_built_in_lengths_are_those_of_real_coco_captions(shared_data: Path) -> None:
    from pipeline.data.text.vocabulary import load_tokenizer

    annotations = shared_data / "coco" / "annotations" / "captions_val2017.json"
    captions = [each["caption"] for each in json.loads(annotations.read_text())["annotations"]]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased" / "vocab.txt")
    counts: dict[int, int] = {}
    for row in tokenizer(captions).input_ids:
        counts[len(row)] = counts.get(len(row), 0) + 1
    assert counts == COCO_LENGTHS
    assert read_lengths(str(annotations)).keys() <= set(range(7, 60))


def test_a_caption_a_line_is_counted_with_its_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("A red dog.\n\na cat\nThe man's hat\n")
    assert read_lengths(str(path)) == {6: 1, 4: 1, 7: 1}


@pytest.mark.parametrize("content", ["", "\n\n", '{"images": []}', '{"annotations": []}', "{"])
def test_a_file_without_captions_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"captions\.json"):
        read_lengths(str(path))


def test_a_batch_stands_for_the_distribution() -> None:
    lengths = batch_lengths({5: 50, 9: 25, 40: 25}, 8, shortest=6, longest=32)
    assert sorted(lengths) == [6, 6, 6, 6, 9, 9, 32, 32]
    assert lengths == batch_lengths({40: 25, 5: 50, 9: 25}, 8, shortest=6, longest=32)
    coco = batch_lengths(COCO_LENGTHS, 1000, 4, 32)
    mean = sum(length * count for length, count in COCO_LENGTHS.items()) / 10006
    assert sum(coco) / 1000 == pytest.approx(mean, abs=0.05)
