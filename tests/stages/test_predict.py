"""What a model says of a picture, what is said beside it, and what a damaged model says."""

import io
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from rich.console import Console

from pipeline import config
from pipeline.cli import run_job
from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError, ModelError, PipelineError
from pipeline.pretrained.files import DIGESTS
from pipeline.pretrained.folder import GENERATION, load_model
from pipeline.recipe import Recipe
from pipeline.stages.predict import predict
from pipeline.stages.run import STAGES, run_stages
from tests.stages.small_recipe import small

SEED = 11
FILES = (
    "config.json",
    "sightline.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    GENERATION,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small recipe has been run once."""
    folder = tmp_path_factory.mktemp("finished")
    scored = ["benchmarks.caption.beams=2", "benchmarks.caption.length_penalty=0.5"]
    run_stages(small(folder, *scored), list(STAGES), Console(stderr=True, quiet=True))
    return folder


@pytest.fixture(scope="module")
def photo(finished: Path) -> str:
    """A held-out picture of the kind that the model was trained on."""
    path = finished / "photo.png"
    path.write_bytes(Dataset.open(str(finished / "data")).split("validation").image(0))
    return str(path)


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(finished / "run" / "model", tmp_path / "model"))


def test_a_caption_is_written_as_it_was_scored(finished: Path, photo: str) -> None:
    run = str(finished / "run")
    decoding = {"beams": 2, "length_penalty": 0.5, "early_stopping": False, "max_new_tokens": 23}
    found = predict(run, photo)
    assert found["decoding"] == decoding
    scored = json.loads((finished / "run" / "evaluation" / "caption.results.json").read_text())
    assert found["text"] == scored[0]["caption"]
    assert predict(run, photo, beams=5)["decoding"] == decoding | {"beams": 5}


def test_transformers_reads_the_same_settings(finished: Path) -> None:
    found = transformers.GenerationConfig.from_pretrained(finished / "run" / "model")
    assert (found.num_beams, found.length_penalty, found.early_stopping) == (2, 0.5, False)
    assert (found.max_new_tokens, found.do_sample) == (23, False)


def test_a_later_evaluation_with_other_settings_is_what_counts(
    finished: Path, tmp_path: Path, photo: str
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "again"))
    scored = ["benchmarks.caption.beams=4", "benchmarks.caption.length_penalty=0.5"]
    run_stages(small(folder, *scored), ["evaluate"], Console(stderr=True, quiet=True))
    assert predict(str(folder / "run"), photo)["decoding"]["beams"] == 4
    load_model(str(folder / "run" / "model"))  # whose digests still fit


def test_scores_of_answers_are_told_as_what_they_are(finished: Path, photo: str) -> None:
    found = predict(str(finished / "run"), photo, "Is there a circle?")
    scores = [row["score"] for row in found["answers"]]
    assert scores == sorted(scores, reverse=True)
    assert all(set(row) == {"answer", "score"} for row in found["answers"])
    assert "do not sum to 1" in found["scores"]
    assert found["text"] == found["answers"][0]["answer"]
    assert found["notes"] == []


@pytest.mark.parametrize(
    ("question", "beams", "said"),
    [
        ("", None, "--question: it is empty"),
        (" \t", None, "--question: it is empty"),
        ("Is there a circle?", 2, "--beams: an answer is chosen"),
    ],
)
def test_what_means_nothing_is_refused(
    finished: Path, photo: str, question: str, beams: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        predict(str(finished / "run"), photo, question, beams)


def test_the_command_line_refuses_an_empty_question_and_shows_notes(
    finished: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(finished / "run")
    assert run_job(["predict", run, "--image", photo, "--question", ""]) == 64
    assert "Refused: --question" in capsys.readouterr().err
    assert run_job(["predict", run, "--image", photo, "--beams", "3"]) == 0
    assert "written with max_new_tokens 23, beams 3" in capsys.readouterr().err
    assert run_job(["predict", run, "--image", photo, "--question", "Is it a zyxw circle?"]) == 0
    assert "Note: the model does not know these words: zyxw" in capsys.readouterr().err
    long = " ".join(["circle"] * 60)
    assert run_job(["predict", run, "--image", photo, "--question", long]) == 0
    assert "has 60 word pieces; only the first 21 are read" in capsys.readouterr().err


def test_a_blind_twin_says_that_it_saw_no_picture(finished: Path, photo: str) -> None:
    blind = str(finished / "run" / "blind" / "model")
    other = finished / "grey.png"
    Image.new("RGB", (64, 64), (128, 128, 128)).save(other)
    asked = [predict(blind, place, "Is there a circle?") for place in (photo, str(other))]
    assert asked[0]["answers"] == asked[1]["answers"]
    assert "this model is a blind twin" in asked[0]["notes"][0]
    assert "no picture" in predict(blind, photo)["notes"][0]


def test_a_picture_unlike_those_of_training_is_answered_with_a_note(
    finished: Path, photo: str, tmp_path: Path
) -> None:
    run = str(finished / "run")
    assert predict(run, photo)["notes"] == []
    noise = random.Random(SEED).randbytes(3 * 640 * 480)
    Image.frombytes("RGB", (640, 480), noise).save(tmp_path / "noise.png")
    notes = predict(run, str(tmp_path / "noise.png"))["notes"]
    assert any("640 pixels of width, in training" in note for note in notes)
    assert any("its features' mean" in note for note in notes)
    assert all("noise.png is unlike the pictures of training" in note for note in notes)


def test_a_missing_tokenizer_is_an_error_and_no_empty_caption(model: Path, photo: str) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: it belongs to the model and is gone"):
        predict(str(model), photo)
    own = json.loads((model / "sightline.json").read_text())
    del own[DIGESTS]  # as in folders from before there were digests
    (model / "sightline.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match=r"it has no words but 5 special tokens; tokenizer\.json"):
        predict(str(model), photo)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("config.json", "hidden_size", "16", "hidden_size is '16'; expected a whole number"),
        ("config.json", "hidden_size", None, "hidden_size is missing; expected a whole number"),
        ("config.json", "num_hidden_layers", 10**12, "num_layers is 1000000000000, and there are"),
        ("config.json", "vocab_size", 10**10, "mis-shaped: "),
        ("config.json", "hidden_size", 10**9, "sizes that no tensor can have"),
        ("config.json", "visual_embedding_dim", 768, "mis-shaped: "),
        ("config.json", "position_fourier", 16, "describes a model of features with 760 values"),
        ("config.json", "model_type", {}, "model_type is {}; expected one of: visual_bert"),
        ("config.json", "num_answers", [], r"num_answers is \[\]; expected a whole number"),
        ("sightline.json", "answers", "yes", "answers is 'yes'; expected a list of texts"),
        ("sightline.json", "answers", [1], "answers: expected texts alone"),
        ("sightline.json", "answers", [], "answers: 0 of them, and the model gives"),
        ("sightline.json", "objectives", 3, "objectives is '3'; expected objectives by name"),
        ("sightline.json", "max_tokens", None, "max_tokens is 'None'; expected a number"),
        ("sightline.json", "extractor", {"type": "pixels"}, "extractor: not the card"),
        ("sightline.json", "extractor", "pixels", "extractor is 'pixels'; expected the card"),
        ("sightline.json", "pictures", {"ranges": 3}, "pictures: "),
        (GENERATION, "num_beams", "3", "num_beams is '3'; Input should be"),
        (GENERATION, "max_new_tokens", -1, "max_new_tokens is '-1'; Input should be"),
        (GENERATION, "early_stopping", [], "early_stopping is"),
        (GENERATION, "length_penalty", 1e300, "length_penalty is '1e.300'; Input should be"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(
    model: Path, photo: str, name: str, key: str, value: Any, said: str
) -> None:
    own = json.loads((model / "sightline.json").read_text())
    own.pop(DIGESTS)  # which would name the file alone
    (model / "sightline.json").write_text(json.dumps(own))
    document = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(document | {key: value}))
    with pytest.raises(ModelError, match=f"{name}.*(?s:.*){said}"):
        predict(str(model), photo)


@pytest.mark.parametrize("name", [name for name in FILES if name != GENERATION])
def test_a_changed_byte_is_found_wherever_it_is(model: Path, photo: str, name: str) -> None:
    payload = bytearray((model / name).read_bytes())
    place = payload.rindex(b'"') - 1 if name.endswith(".json") else len(payload) - 7
    payload[place] ^= 1
    (model / name).write_bytes(payload)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        predict(str(model), photo)


def damages(payload: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yields ways in which a file can be damaged; None is a file that is gone."""
    yield "gone", None
    yield "empty", b""
    yield "cut", payload[: rng.randrange(len(payload))]
    yield "zeros", bytes(len(payload))
    yield "other JSON", rng.choice([b"[]", b"null", b"3", b'"x"', b"{}", b"[" * 100_000])
    yield "not UTF-8", b"\xff\xfe" + payload
    for _ in range(5):
        place, bit = rng.randrange(len(payload)), rng.randrange(8)
        flipped = bytearray(payload)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)


@pytest.mark.parametrize("digests", [True, False], ids=["with digests", "without"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_model_is_an_error_in_a_sentence_or_says_the_same(
    model: Path, photo: str, name: str, digests: bool
) -> None:
    """Without digests, as in older folders, a flipped bit of a weight or a word can pass."""
    print("seed", SEED)
    if not digests:
        own = json.loads((model / "sightline.json").read_text())
        own.pop(DIGESTS)
        (model / "sightline.json").write_text(json.dumps(own))
    whole = predict(str(model), photo, "Is there a circle?")["answers"]
    caption = predict(str(model), photo)["text"]
    payload = (model / name).read_bytes()
    for damage, damaged in damages(payload, random.Random(f"{SEED} {name}")):
        if damaged is None:
            (model / name).unlink()
        else:
            (model / name).write_bytes(damaged)
        try:
            said = predict(str(model), photo, "Is there a circle?")["answers"]
            wrote = predict(str(model), photo)
        except PipelineError as raised:
            error = str(raised)
        else:
            error = ""
            if digests and name != GENERATION:
                assert said == whole, damage
                assert wrote["text"] == caption, damage
        assert not error or str(model) in error, (damage, error)
        assert len(error) < 3000, damage
        (model / name).write_bytes(payload)


@pytest.mark.parametrize("shape", [(0, 0), (2**16, 2**16)])
def test_a_picture_that_is_none_is_named(
    finished: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    payload = bytearray(blank.getvalue())
    payload[16:24] = struct.pack(">II", *shape)
    (tmp_path / "odd.png").write_bytes(payload)
    with pytest.raises(PipelineError, match=r"odd\.png"):
        predict(str(finished / "run"), str(tmp_path / "odd.png"))


def test_published_weights_that_cannot_start_the_model_are_refused_before_ingest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    theirs = transformers.BertConfig(
        **sizes, num_attention_heads=2, vocab_size=9, max_position_embeddings=32
    )
    transformers.BertModel(theirs).save_pretrained(bert)
    (bert / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"])
    )
    recipe = tmp_path / "recipe.yaml"

    def run(*overrides: str) -> str:
        recipe.write_text(config.to_yaml(small(tmp_path, f"model.initial={bert}", *overrides)))
        assert run_job(["run", str(recipe)]) == 64
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err

    assert "model.tokenizer is null" in run()
    given = f"model.tokenizer={bert / 'vocab.txt'}"
    other = tmp_path / "other.txt"
    other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abdc"]))
    assert f"set model.tokenizer={bert}" in run(f"model.tokenizer={other}")
    longer = tmp_path / "longer.txt"
    longer.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    assert "`model.tokenizer`" in run(f"model.tokenizer={longer}")
    assert "model.sizes.num_heads=2" in run(given, "model.sizes.num_heads=4")
    assert "mis-shaped" in run(given, "model.sizes.intermediate_size=32")
    config.load(Recipe, str(recipe), [])
