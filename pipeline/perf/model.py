"""`sightline bench model`: how fast models train and write, beside transformers'."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from pipeline.config import Config
from pipeline.models.inputs import Inputs
from pipeline.models.lxmert import LxmertConfig
from pipeline.models.visual_prefix import VisualPrefixConfig
from pipeline.models.visualbert import VisualBertConfig
from pipeline.perf import captions, measure, training_step
from pipeline.perf.generation import Generation
from pipeline.perf.result import Comparison, Result

NUM_TOKENS, NUM_REGIONS = 32, 36  # as BERT-like captions are padded, as detectors give regions
NEW_TOKENS = 20  # of a generated caption
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Sizes for trying out that everything runs; base is every config's default.
TINY = {"vocab_size": 300, "width": 48, "num_heads": 4, "intermediate_size": 96, "feature_dim": 24}
TINY_DEPTHS = {"text_layers": 2, "region_layers": 1, "cross_layers": 1}
TINY_HEADS = {"num_objects": 7, "num_attributes": 5}


class ModelBenchConfig(Config):
    """What is measured and how often."""

    size: Literal["tiny", "base"] = "base"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights, gradients and optimizer alike
    threads: PositiveInt | None = None  # None: as many as torch takes
    rounds: PositiveInt = 3
    batch_size: PositiveInt = 16
    captions: str | None = None  # whose lengths; None: COCO's
    compiled: bool = False  # also ours through torch.compile


def run(config: ModelBenchConfig, show: Callable[[Comparison], None]) -> Result:
    """Measures everything on the GPU if there is one, else on the CPU.

    `show` is given each comparison when it is made.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads_before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        machine = measure.machine(device)
        torch.manual_seed(0)
        comparisons = []
        for comparison in chain(_training(config, device), _generation(config, device)):
            show(comparison)
            comparisons.append(comparison)
    finally:
        torch.set_num_threads(threads_before)
    return Result("model", config.model_dump(mode="json"), machine, comparisons)


def _training(config: ModelBenchConfig, device: torch.device) -> Iterator[Comparison]:
    counts = captions.read_lengths(config.captions) if config.captions else captions.COCO_LENGTHS
    shortest = training_step.MASKED_PER_TEXT + 2
    lengths = captions.batch_lengths(counts, config.batch_size, shortest, NUM_TOKENS)
    how = (lengths, NUM_TOKENS, NUM_REGIONS, config.rounds, device, DTYPES[config.dtype])
    # each is made only when the other's weights are gone
    yield training_step.compare(
        training_step.visualbert(visualbert_config(config.size)), *how, config.compiled
    )
    yield training_step.compare(
        training_step.lxmert(lxmert_config(config.size)), *how, config.compiled
    )


def _generation(config: ModelBenchConfig, device: torch.device) -> Iterator[Comparison]:
    dtype = DTYPES[config.dtype]
    visualbert, prefix = visualbert_config(config.size), prefix_config(config.size)
    inputs = captionless_images(config.batch_size, visualbert.feature_dim, device, dtype)
    generation = Generation(inputs, NEW_TOKENS, config.rounds, device, dtype)
    yield generation.cached_and_uncached(visualbert)
    yield generation.stream_and_transformers(visualbert)
    yield generation.prefix_and_transformers(prefix)


def visualbert_config(size: str) -> VisualBertConfig:
    return VisualBertConfig.model_validate({**TINY, "num_layers": 2} if size == "tiny" else {})


def lxmert_config(size: str) -> LxmertConfig:
    sizes = {**TINY, **TINY_DEPTHS, **TINY_HEADS}
    return LxmertConfig.model_validate(sizes if size == "tiny" else {})


def prefix_config(size: str) -> VisualPrefixConfig:
    """GPT-2's smallest, as published, or less."""
    decoder: dict[str, Any] = {"model_type": "gpt2", "bos_token_id": None, "eos_token_id": None}
    if size == "base":
        return VisualPrefixConfig(vocab_size=50257, decoder=decoder)
    decoder |= {"n_embd": TINY["width"], "n_head": TINY["num_heads"], "n_layer": 2}
    return VisualPrefixConfig.model_validate({**TINY, "decoder": decoder})


def captionless_images(
    num_rows: int, feature_dim: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Images of which nothing is written but the first token, a different one for each."""
    random = torch.Generator().manual_seed(1)
    corners = torch.rand(num_rows, NUM_REGIONS, 4, generator=random)
    return Inputs(
        tokens=torch.arange(5, 5 + num_rows)[:, None],
        token_padding=torch.zeros(num_rows, 1, dtype=torch.bool),
        features=torch.randn(num_rows, NUM_REGIONS, feature_dim, generator=random).to(dtype),
        boxes=torch.cat([corners[..., :2] / 2, 0.5 + corners[..., 2:] / 2], dim=-1).to(dtype),
        region_padding=torch.zeros(num_rows, NUM_REGIONS, dtype=torch.bool),
    ).to(device)
