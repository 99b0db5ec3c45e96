"""The record of a phase in its folder, for those who read it: its spec."""

import contextlib
import json

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import as_now, selected, settings
from pipeline.errors import StorageError, TrainingError
from pipeline.training.config import TrainingConfig
from pipeline.training.continuation import differences, fixed
from pipeline.training.spec import TrainingSpec

SPEC = "spec.json"  # RUN/<phase>/spec.json: what the phase is, for those who read its folder


def read_spec(folder: str) -> TrainingSpec:
    """Returns what a phase's folder holds a run of; raises TrainingError if nobody has told.

    A training setting that this release does not have is left out.
    """
    try:
        document = json.loads(storage.read_bytes(storage.join(folder, SPEC)))
        training = as_now(TrainingConfig, document["training"])
        known = selected(training, settings(TrainingConfig))
        return TrainingSpec.model_validate({**document, "training": known})
    except (
        StorageError,
        ValidationError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise TrainingError(f"{folder}: {SPEC} does not say what was trained: {error}") from error


def record(spec: TrainingSpec) -> None:
    """Leaves the spec in its folder, unless another run is there, which the ranks will refuse."""
    with contextlib.suppress(TrainingError):  # there is none, or one that nobody can use
        begun = read_spec(spec.folder).reproducibility_key()
        if fixed(differences(begun, spec.reproducibility_key(), spec.phase)):
            return
    location = storage.join(spec.folder, SPEC)
    storage.write_bytes(location, spec.model_dump_json(indent=1).encode())
