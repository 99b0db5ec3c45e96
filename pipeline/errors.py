"""The errors a user can meet, one class per part of the pipeline.

A message says where (file, key, field), what was found, what was expected, and what to try.
"""

from pipeline.reason import Reason


class PipelineError(Exception):
    """The base of every error that Sightline raises on purpose."""


class ConfigError(PipelineError):
    """A recipe, an override or a combination of settings is refused before work starts."""


class ClusterError(PipelineError):
    """Ray cannot be started or joined, or was lost."""


class StorageError(PipelineError):
    """A path or object store cannot be read or written."""


class SourceError(PipelineError):
    """An annotation file or image folder is not what its format promises."""


class ShardError(PipelineError):
    """A shard or sidecar cannot be written or read."""


class ManifestError(PipelineError):
    """A dataset's manifest is missing, damaged, or was changed by another writer."""


class RejectError(PipelineError):
    """More records were rejected than the recipe allows."""


class RemovalError(PipelineError):
    """More samples would leave a dataset than the recipe allows."""


class FeatureError(PipelineError):
    """Features are missing, do not match their samples, or cannot be computed."""


class UnusableImageError(FeatureError):
    """An image of which no feature can be made. `reason` is a reject's."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"not a usable image: {self.reason}: {self.detail}"


class ModelError(PipelineError):
    """A model's weights or configuration do not fit its family."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(PipelineError):
    """Training cannot start or cannot go on."""


class BusyError(TrainingError):
    """Another process is at work in a run's folder."""


class LostError(TrainingError):
    """A run's folder was taken over by another process, or taken away, while it was at work."""


class MetricError(PipelineError):
    """Results do not match the references they are scored against."""


class StageError(PipelineError):
    """A stage needs what an earlier stage has not made."""


class StoppedError(PipelineError):
    """A run was told to stop; it left a checkpoint, and the same command continues it."""
