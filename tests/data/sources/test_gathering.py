import pytest

from pipeline.data.sources.gathering import Gathering
from pipeline.errors import StorageError


def test_values_come_back_by_key_in_the_order_they_were_put() -> None:
    keys = [f"key-{number % 70}" for number in range(500)]
    with Gathering() as found:
        for number, key in enumerate(keys):
            found.add(key, {"number": number, "words": "ü\n"})
        groups = dict(found.groups())
    assert len(groups) == 70
    for key, values in groups.items():
        numbers = [value["number"] for value in values]
        assert numbers == [number for number, name in enumerate(keys) if name == key]


def test_the_order_of_keys_does_not_depend_on_the_order_of_putting() -> None:
    orders = []
    for keys in (["a", "b", "c", "d"], ["d", "b", "a", "c"]):
        with Gathering() as found:
            for key in keys:
                found.add(key, 1)
            orders.append([key for key, _ in found.groups()])
    assert orders[0] == orders[1]


def test_nothing_gathered_is_no_group() -> None:
    with Gathering() as found:
        assert list(found.groups()) == []


def test_a_full_scratch_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    with Gathering() as found:
        found._file.close()
        monkeypatch.setattr(found, "_file", Full())
        with pytest.raises(StorageError, match="TMPDIR"):
            found.add("a", 1)
