import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.training.engine.known_keys import AskedFor, invalid


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Disk(Section):
    path: str = ""


class Cache(Section):
    size_bytes: int = 0
    disk: Disk | None = None


def test_keys_that_a_reader_did_not_ask_for_are_named_with_the_near_ones() -> None:
    settings = AskedFor({"rate": 1, "rtae": 2, "inner": {"size": 3, "sise": 4}, "rest": {"a": 1}})
    settings.get("rate")
    assert "inner" in settings
    settings["inner"].get("size", 0)
    settings.pop("rest")
    assert settings.not_asked_for() == [
        "inner.sise: unknown key; did you mean 'size'?",
        "rtae: unknown key; did you mean 'rate'?",
    ]


def test_a_model_that_is_made_of_all_keys_has_asked_for_them() -> None:
    settings = AskedFor({"cache": {"size_bytes": 3, "disk": {"path": "a"}}})
    assert Cache(**settings["cache"]).size_bytes == 3
    assert settings.not_asked_for() == []


def test_what_a_model_refuses_is_named_from_the_top() -> None:
    given = {"store": {"cache": {"size_bytes": "many", "disk": {"paht": "a"}}}}
    with pytest.raises(ValidationError) as error:
        Cache(**given["store"]["cache"])
    size, path = invalid(error.value, given, Section)
    assert size.startswith("store.cache.size_bytes: found 'many'; Input should be a valid integer")
    assert path == "store.cache.disk.paht: unknown key; did you mean 'path'?"
