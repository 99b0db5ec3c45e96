"""The model card: README.md of a model folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import yaml

from pipeline import __version__
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.pretrained.files import extractor_of
from pipeline.vision.extractors.live import backbone_config

# transformers' classes for the families that it has, by `model_type`
TRANSFORMERS_CLASSES = {"visual_bert": "VisualBertModel", "lxmert": "LxmertModel"}
BLIND = "_blind"  # the end of the name of what the twin without images scored


@dataclass(frozen=True)
class ModelCard:
    """What the page tells.

    `made` is what the model folder records: data, extractor, training, and how many steps of it
    were made.
    """

    model_type: str
    made: Mapping[str, Any]
    num_parameters: int
    num_answers: int
    figures: Mapping[str, float] = field(default_factory=dict)  # losses in training at that step
    metrics: Mapping[str, float] = field(default_factory=dict)  # on the held-out split
    environment: Mapping[str, Any] = field(default_factory=dict)  # of RUN/environment.json
    recipe: str = ""  # YAML; empty if the run has left none

    @cached_property
    def _extractor(self) -> ExtractorCard | None:
        return extractor_of(self.made)

    def page(self) -> str:
        """Returns Markdown with the front matter that the Hugging Face hub reads."""
        title = f"{self.made['recipe']}: a {self.made['family']} model"
        header = yaml.safe_dump(self._front_matter(title), sort_keys=False, allow_unicode=True)
        limits = "\n".join(f"- {limit}" for limit in self._limits())
        parts = [
            f"---\n{header}---",
            f"# {title}",
            f"Trained with Sightline {__version__}; phase `{self.made['phase']}`, "
            f"{self._progress()}, {self.num_parameters:,} parameters.",
            f"## Use\n{self._use()}",
            f"## Metrics\n{self._metrics()}",
            f"## Data\n{_table(self._data())}",
            f"## Training\n{_table(self._settings())}",
            *([f"## Initial weights\n{self._initial()}"] if "initial" in self.made else []),
            f"## Limits\n{limits}",
        ]
        if self.recipe:
            parts.append(f"## Recipe\n```yaml\n{self.recipe.rstrip()}\n```")
        return "\n\n".join(parts) + "\n"

    def _front_matter(self, title: str) -> dict[str, Any]:
        objectives = self.made["objectives"]
        asked = {"answer": "visual-question-answering", "lm": "image-to-text"}
        purposes = [purpose for name, purpose in asked.items() if name in objectives]
        matter: dict[str, Any] = {
            "library_name": "transformers" if self._opened_by() else "sightline",
            "tags": ["vision-language", self.model_type, "sightline"],
        }
        if purposes:
            matter["pipeline_tag"] = purposes[0]
        if self.metrics:
            results = [
                {
                    "task": {"type": name.split("/")[0]},
                    "dataset": {"name": self._dataset(), "type": self._dataset()},
                    "metrics": [{"type": name.split("/", 1)[1], "value": value}],
                }
                for name, value in self._headlines().items()
            ]
            matter["model-index"] = [{"name": title, "results": results}]
        return matter

    def _use(self) -> str:
        question = " --question 'What is this?'" if self.num_answers else ""
        lines = [f"```sh\nsightline predict FOLDER --image photo.jpg{question}\n```"]
        opened_by = self._opened_by()
        if opened_by:
            lines.append(
                f"```python\ntransformers.{opened_by}.from_pretrained('FOLDER')\n```\n"
                "It wants an image's features as the extractor below makes them; "
                "`sightline.json` describes it. With `position_fourier` in `config.json`, each "
                "region's features end in that many sines and cosines of its box."
            )
        if backbone_config(self._extractor):
            lines.append(
                "It sees with a network that was trained with it: `backbone.safetensors` holds "
                "that network's weights under torchvision's names."
            )
        return "\n\n".join(lines)

    def _metrics(self) -> str:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        training = f"In training at step {self.made['step']:,}: {losses}." if losses else ""
        if not self.metrics:
            return f"Not scored on held-out data when this was written. {training}".strip()
        rows = {name: f"{value:.2f}" for name, value in self._headlines().items()}
        return f"{_table(rows, ('held-out split', 'score'))}\n\n{training}".strip()

    def _headlines(self) -> dict[str, float]:
        """Returns what is scored as a whole, without its parts by question type."""
        return {name: value for name, value in self.metrics.items() if name.count("/") == 1}

    def _data(self) -> dict[str, Any]:
        extractor = self._extractor
        data = self.made["data"]
        return {
            "dataset": self._dataset(),
            "version of its manifest": data["version"],
            "trained on split": data["split"],
            "visual features": data["features"] or "none",
            "identity of the extractor": extractor.identity if extractor else "none",
            "image regions": f"{extractor.dim} numbers each" if extractor else "none",
        }

    def _settings(self) -> dict[str, Any]:
        names = (
            "global_batch_size",
            "optimizer.learning_rate",
            "schedule.warmup_steps",
            "schedule.decay",
            "optimizer.weight_decay",
            "precision",
            "zero_stage",
        )
        known = ("code_revision", "workers", "gpus_per_worker")
        found = {name: self.environment[name] for name in known if name in self.environment}
        libraries = self.environment.get("libraries", {})
        versions = {name: libraries.get(name, "") for name in ("torch", "deepspeed", "ray")}
        return {
            "objectives": ", ".join(self.made["objectives"]),
            **{name.rsplit(".", 1)[-1].replace("_", " "): self._training(name) for name in names},
            "seed": self.made["seed"],
            **{name.replace("_", " "): value for name, value in found.items()},
            **{name: version for name, version in versions.items() if version},
        }

    def _initial(self) -> str:
        """Says what was taken over from another model, what was not, and what is new."""
        initial = self.made["initial"]
        rows = {
            "from": initial["initial"],
            "parameters taken over": initial["taken"],
            f"new ({initial['new']})": ", ".join(initial["new_parameters"]) or "none",
            f"left out ({initial['left_out']})": ", ".join(initial["left_out_tensors"]) or "none",
            "of another size, and so new": ", ".join(initial["misshaped"]) or "none",
        }
        return _table(rows)

    def _limits(self) -> Sequence[str]:
        limits = [
            "It knows what its training data showed it and no more: expect it to be wrong, and "
            "to repeat that data's biases, elsewhere.",
            f"It reads at most {self.made['max_tokens']} word pieces and cuts off the rest.",
            "It sees an image only through the extractor named above; other features are noise "
            "to it.",
        ]
        if self.num_answers:
            limits.append(
                f"It answers with one of {self.num_answers:,} answers, those of its training data."
            )
        weights = self._extractor and self._extractor.weights
        if weights and weights.random:
            limits.append("Its extractor has random weights: the features mean little.")
        if self.made["step"] < self._training("steps"):
            limits.append(
                f"It was taken from training at {self._progress()}, before the learning rate had "
                "come down."
            )
        for name, blind in self._headlines().items():
            whole = name.removesuffix(BLIND)
            if name.endswith(BLIND) and whole in self.metrics:
                limits.append(
                    f"Of {self.metrics[whole]:.2f} in {whole}, a twin that never sees an image "
                    f"reaches {blind:.2f}."
                )
        if not self.metrics:
            limits.append("When this was written, nobody had measured how good it is on new data.")
        return limits

    def _progress(self) -> str:
        return f"step {self.made['step']:,} of {self._training('steps'):,}"

    def _training(self, key: str) -> Any:
        """Returns a setting of training; earlier releases recorded them without their groups."""
        settings, (*groups, name) = self.made["training"], key.split(".")
        for group in groups:
            settings = settings.get(group, settings)
        return settings[name]

    def _dataset(self) -> str:
        return PurePosixPath(str(self.made["data"]["dataset"])).name

    def _opened_by(self) -> str | None:
        return TRANSFORMERS_CLASSES.get(self.model_type)


def _table(rows: Mapping[str, Any], header: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
