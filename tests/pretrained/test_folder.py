import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.data.text.vocabulary import build_tokenizer, save_tokenizer
from pipeline.errors import ConfigError, ModelError
from pipeline.models.families import build
from pipeline.models.generation import Decoding
from pipeline.pretrained.files import OWN, is_model
from pipeline.pretrained.folder import (
    GENERATION,
    PAGE,
    initialise,
    load_model,
    require_same_words,
    save_decoding,
    save_model,
)
from tests.models.examples import randomise, visualbert_config
from tests.pretrained.test_card import card

CAPTIONS = ["a red bird sits on a green branch", "two birds fly"]
ANSWERS = ("red", "green", "two")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("words"))
    save_tokenizer(build_tokenizer(CAPTIONS, 60), folder)
    return folder


@pytest.fixture
def folder(words: str, tmp_path: Path) -> Path:
    """A model as a run leaves it."""
    config = visualbert_config(vocab_size=60, num_answers=len(ANSWERS))
    model = randomise(build(config))
    save_model(
        str(tmp_path / "model"),
        config=config,
        parameters=dict(model.named_parameters()),
        tokenizer=words,
        answers=ANSWERS,
        card=card(num_answers=len(ANSWERS)),
        decoding=Decoding(max_new_tokens=12, beams=3),
    )
    return tmp_path / "model"


def test_what_is_opened_is_what_was_saved(folder: Path) -> None:
    opened = load_model(str(folder))
    assert (opened.answers, opened.decoding) == (ANSWERS, Decoding(max_new_tokens=12, beams=3))
    assert opened.card["recipe"] == "birds"
    assert opened.tokenizer.tokenize("a bird")[0] == "a"
    assert not opened.model.training
    again = build(opened.model.config)
    assert initialise(again, str(folder)).new == ()
    theirs = dict(opened.model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_transformers_reads_how_texts_were_written(folder: Path) -> None:
    document = json.loads((folder / GENERATION).read_text())
    assert (document["num_beams"], document["max_new_tokens"], document["do_sample"]) == (
        3,
        12,
        False,
    )
    save_decoding(str(folder), Decoding(max_new_tokens=5))  # a later evaluation may write otherwise
    assert load_model(str(folder)).decoding == Decoding(max_new_tokens=5)
    (folder / GENERATION).write_text(json.dumps(document | {"num_beams": "many"}))
    with pytest.raises(ModelError, match=r"generation_config\.json: num_beams is 'many'"):
        load_model(str(folder))


def test_a_folder_is_whole_only_with_its_last_file(folder: Path) -> None:
    assert is_model(str(folder))
    assert (folder / PAGE).read_text().startswith("---\n")
    (folder / OWN).unlink()
    assert not is_model(str(folder))
    with pytest.raises(ModelError, match=str(folder)):
        load_model(str(folder))


def test_a_file_that_was_replaced_is_named(folder: Path, words: str, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "others")
    save_tokenizer(build_tokenizer(["zebras", *CAPTIONS], 60), str(tmp_path / "others"))
    shutil.copy(tmp_path / "others" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model(str(folder))


def test_a_record_that_was_changed_is_told(folder: Path) -> None:
    own = json.loads((folder / OWN).read_text())
    (folder / OWN).write_text(json.dumps(own | {"answers": ["red"]}))
    with pytest.raises(
        ModelError, match=r"sightline\.json: damaged, or changed since the model was saved"
    ):
        load_model(str(folder))


def test_a_tokenizer_that_numbers_words_otherwise_is_no_start(
    folder: Path, words: str, tmp_path: Path
) -> None:
    require_same_words(words, str(folder))
    other = str(tmp_path / "other")
    save_tokenizer(build_tokenizer(["zebras graze", *CAPTIONS], 60), other)
    with pytest.raises(ConfigError, match=r"words are not those of this run's tokenizer, such as"):
        require_same_words(other, str(folder))
