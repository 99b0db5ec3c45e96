"""What training reads: the newest version of a dataset, opened with its features."""

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.read.images import LiveConfig
from pipeline.recipe import MixedInPart, Recipe
from pipeline.stages.changed import Begun
from pipeline.stages.preflight import require_splits
from pipeline.stages.progress import StageProgress
from pipeline.training.spec import MixedIn
from pipeline.vision.extractors.live import live_config


@dataclass(frozen=True)
class DataInputs:
    """What training reads, opened: the newest version of the dataset with its features.

    Features are stored under the extractor's name, or `live`: made of the pictures for each batch.
    """

    dataset: Dataset
    extractor: ExtractorCard
    mixed_in: tuple[tuple[Dataset, MixedInPart], ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict)  # by split: samples without features

    @classmethod
    def open(cls, recipe: Recipe) -> "DataInputs":
        """Raises ManifestError or FeatureError if an earlier stage has work to do.

        ConfigError names a split or texts that the dataset does not have.
        """
        dataset = Dataset.open(recipe.dataset.path)
        require_splits(recipe, dataset)
        card = recipe.features.card()
        others = ((Dataset.open(other.path), other) for other in recipe.dataset.mixed_in)
        inputs = cls(dataset, card, tuple(others))
        for other, part in inputs.mixed_in:
            other.split(part.split, inputs.live or inputs.features)
        for split in (recipe.dataset.train_split, recipe.dataset.validation_split):
            inputs.passed_over[split] = inputs.split(split).num_rejects
        return inputs

    def tell(self, progress: StageProgress) -> None:
        """Says how many samples are passed over, as their images have no features."""
        for split, number in self.passed_over.items():
            if number:
                progress.note(
                    f"split {split}: {number:,} samples without features of {self.name} are passed "
                    f"over; `sightline data rejects {self.dataset.url}` lists them"
                )

    @property
    def features(self) -> str | None:
        """The extractor's folder under `features/`; None if nothing is stored there."""
        return None if self.live else self.name

    @property
    def live(self) -> LiveConfig | None:
        """How pictures become features as they are read, if they do."""
        return live_config(self.extractor)

    @property
    def name(self) -> str:
        """What made the features, in a word."""
        return self.extractor.name

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, if the regions are a grid's cells."""
        return self.extractor.grid

    def split(self, name: str) -> Split:
        """Opens a split whose pictures are seen as they are, without augmentation."""
        return self.dataset.split(name, self.live.whole() if self.live else self.features)

    def at_versions_of(self, begun: Begun) -> "DataInputs":
        """Returns the same data as an unfinished phase began with it.

        A later version may hold other samples, or the same in another order.
        """
        spec = begun.spec
        if begun.finished or spec.dataset != storage.absolute(self.dataset.url):
            return self
        others = self.mixed_in
        if as_begun(begun, self.mixed_in_versions()) == spec.mixed_in:
            versions = [one.dataset_version for one in spec.mixed_in]
            others = tuple(
                (Dataset.open(other.url, version), part)
                for (other, part), version in zip(self.mixed_in, versions, strict=True)
            )
        dataset = Dataset.open(self.dataset.url, spec.dataset_version)
        return replace(self, dataset=dataset, mixed_in=others)

    def mixed_in_versions(self) -> tuple[MixedIn, ...]:
        return tuple(
            MixedIn(
                dataset=other.url,
                dataset_version=other.version,
                split=part.split,
                weight=part.weight,
            )
            for other, part in self.mixed_in
        )

    def identity(self, *splits: str) -> dict[str, Any]:
        """Says what there is to learn from in these splits, wherever and in which version."""
        return {
            "dataset": self.dataset.url,
            "content": {split: self.dataset.content(split) for split in splits},
            "features": self.name,
            "mixed_in": [
                {"dataset": other.url, "content": other.content(part.split), "weight": part.weight}
                for other, part in self.mixed_in
            ],
        }


def as_begun(begun: Begun, mixed_in: tuple[MixedIn, ...]) -> tuple[MixedIn, ...]:
    """Returns the datasets beside the own one in the versions that a phase was begun with."""
    absent = {"dataset_version"}
    if begun.finished:  # of which the content has been compared, wherever it lies
        absent.add("dataset")
    then = [one.model_dump(exclude=absent) for one in begun.spec.mixed_in]
    now = [one.model_dump(exclude=absent) for one in mixed_in]
    return begun.spec.mixed_in if then == now else mixed_in
