"""ViLBERT against the published equations, written out plainly over the published tensor names."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import ModelError
from pipeline.models.families import build, from_saved, load_weights, to_saved
from pipeline.models.inputs import Inputs
from pipeline.models.vilbert import Vilbert, VilbertConfig
from tests.models.equations import Equations
from tests.models.examples import (
    ANSWERS,
    assert_close,
    batch,
    randomise,
    row,
    vilbert_config,
)

Shapes = dict[str, tuple[int, ...]]


def published_tensors(config: VilbertConfig) -> Shapes:
    """Lists the tensors of BertForMultiModalPreTraining as its authors' code makes them."""
    shapes: Shapes = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def layer(name: str, width: int, inner: int) -> None:
        for part in ("query", "key", "value"):
            linear(f"{name}.attention.self.{part}", width, width)
        linear(f"{name}.attention.output.dense", width, width)
        norm(f"{name}.attention.output.LayerNorm", width)
        linear(f"{name}.intermediate.dense", inner, width)
        linear(f"{name}.output.dense", width, inner)
        norm(f"{name}.output.LayerNorm", width)

    text, vision, both = config.width, config.region_width, config.co_width
    shapes["bert.embeddings.word_embeddings.weight"] = (config.vocab_size, text)
    shapes["bert.embeddings.position_embeddings.weight"] = (config.max_positions, text)
    shapes["bert.embeddings.token_type_embeddings.weight"] = (config.type_vocab_size, text)
    norm("bert.embeddings.LayerNorm", text)
    linear("bert.v_embeddings.image_embeddings", vision, config.feature_dim)
    linear("bert.v_embeddings.image_location_embeddings", vision, 5)
    norm("bert.v_embeddings.LayerNorm", vision)
    for index in range(config.text_layers):
        layer(f"bert.encoder.layer.{index}", text, config.intermediate_size)
    for index in range(config.region_layers):
        layer(f"bert.encoder.v_layer.{index}", vision, config.region_intermediate_size)
    for index in range(len(config.text_connections)):
        name = f"bert.encoder.c_layer.{index}"
        for number, width in (("1", vision), ("2", text)):
            for part in ("query", "key", "value"):
                linear(f"{name}.biattention.{part}{number}", both, width)
            linear(f"{name}.biOutput.dense{number}", width, both)
            norm(f"{name}.biOutput.LayerNorm{number}", width)
            linear(f"{name}.biOutput.q_dense{number}", width, both)
        for letter, width, inner in (
            ("v", vision, config.region_intermediate_size),
            ("t", text, config.intermediate_size),
        ):
            linear(f"{name}.{letter}_intermediate.dense", inner, width)
            linear(f"{name}.{letter}_output.dense", width, inner)
            norm(f"{name}.{letter}_output.LayerNorm", width)
    linear("bert.t_pooler.dense", both, text)
    linear("bert.v_pooler.dense", both, vision)
    linear("cls.predictions.transform.dense", text, text)
    norm("cls.predictions.transform.LayerNorm", text)
    shapes["cls.predictions.bias"] = (config.vocab_size,)
    shapes["cls.predictions.decoder.weight"] = (config.vocab_size, text)
    linear("cls.bi_seq_relationship", 2, both)
    linear("cls.imagePredictions.transform.dense", vision, vision)
    norm("cls.imagePredictions.transform.LayerNorm", vision)
    linear("cls.imagePredictions.decoder", config.num_objects, vision)
    return shapes


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    return tensors


class VilbertEquations(Equations):
    """The published forward pass of one sample without padding."""

    def __init__(self, tensors: dict[str, Tensor], config: VilbertConfig) -> None:
        super().__init__(tensors)
        self.config = config

    def connection(self, name: str, vision: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        def heads(number: str, x: Tensor) -> list[Tensor]:
            return [
                self.linear(f"{name}.biattention.{part}{number}", x)
                for part in ("query", "key", "value")
            ]

        query1, key1, value1 = heads("1", vision)
        query2, key2, value2 = heads("2", text)
        text_reads = self.attention(query2, key1, value1, self.config.co_heads)
        vision_reads = self.attention(query1, key2, value2, self.config.co_heads)
        output = f"{name}.biOutput"
        vision = self.norm(
            f"{output}.LayerNorm1", self.linear(f"{output}.dense1", vision_reads) + vision
        )
        text = self.norm(f"{output}.LayerNorm2", self.linear(f"{output}.dense2", text_reads) + text)
        streams = []
        for letter, x in (("v", vision), ("t", text)):
            inner = self.gelu(self.linear(f"{name}.{letter}_intermediate.dense", x))
            added = self.linear(f"{name}.{letter}_output.dense", inner) + x
            streams.append(self.norm(f"{name}.{letter}_output.LayerNorm", added))
        return streams[0], streams[1]

    def __call__(self, tokens: Tensor, features: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Maps tokens (T,), features (R, F) and boxes (R, 4) to the outputs of every head."""
        text = self.text("bert.embeddings", tokens)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        locations = torch.cat([boxes, area[:, None]], dim=1)
        locations = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]), locations])
        features = torch.cat([features.mean(0, keepdim=True), features])
        vision = self.linear("bert.v_embeddings.image_embeddings", features)
        vision = vision + self.linear("bert.v_embeddings.image_location_embeddings", locations)
        vision = self.norm("bert.v_embeddings.LayerNorm", vision)
        config = self.config
        steps: list[tuple[str, int]] = []
        text_done = vision_done = 0
        pairs = zip(config.text_connections, config.region_connections, strict=True)
        for index, (text_next, vision_next) in enumerate(pairs):
            steps += [("layer", layer) for layer in range(text_done, text_next)]
            steps += [("v_layer", layer) for layer in range(vision_done, vision_next)]
            steps.append(("c_layer", index))
            text_done, vision_done = text_next, vision_next
        steps += [("v_layer", layer) for layer in range(vision_done, config.region_layers)]
        steps += [("layer", layer) for layer in range(text_done, config.text_layers)]
        for kind, index in steps:
            name = f"bert.encoder.{kind}.{index}"
            if kind == "layer":
                text = self.layer(name, text, config.num_heads)
            elif kind == "v_layer":
                vision = self.layer(name, vision, config.region_heads)
            else:
                vision, text = self.connection(name, vision, text)
        pooled = torch.relu(self.linear("bert.t_pooler.dense", text[0]))
        pooled = pooled * torch.relu(self.linear("bert.v_pooler.dense", vision[0]))
        words = self.norm(
            "cls.predictions.transform.LayerNorm",
            self.gelu(self.linear("cls.predictions.transform.dense", text)),
        )
        objects = self.norm(
            "cls.imagePredictions.transform.LayerNorm",
            self.gelu(self.linear("cls.imagePredictions.transform.dense", vision[1:])),
        )
        word = self.tensors["bert.embeddings.word_embeddings.weight"]
        return {
            "text": text,
            "regions": vision[1:],
            "pooled": pooled,
            "words": words @ word.T + self.tensors["cls.predictions.bias"],
            "match": self.linear("cls.bi_seq_relationship", pooled),
            "objects": self.linear("cls.imagePredictions.decoder", objects),
        }


@torch.no_grad()
@pytest.mark.parametrize(
    "connections",
    [
        {},
        {"text_layers": 3, "text_connections": (2,), "region_connections": (1,)},
        {
            "text_layers": 5,
            "region_layers": 4,
            "text_connections": (1, 2, 4),
            "region_connections": (0, 1, 3),
        },
        # the published ones: k of the last text layers, as many region layers
        *(
            {
                "text_layers": 12,
                "region_layers": k,
                "text_connections": tuple(range(12 - k, 12)),
                "region_connections": tuple(range(k)),
            }
            for k in (2, 4, 6, 8)
        ),
    ],
)
def test_every_head_gives_what_the_published_equations_give(connections: dict[str, Any]) -> None:
    config = vilbert_config(**connections)
    tensors = drawn(published_tensors(config))
    ours = Vilbert(config).eval()
    report = load_weights(ours, tensors, "original")
    inputs = batch()
    encoded = ours.encode(inputs)
    for index in range(2):
        alone = row(inputs, index)
        equations = VilbertEquations(tensors, config)
        expected = equations(alone.tokens[0], alone.features[0], alone.boxes[0])
        text, regions = ~inputs.token_padding[index], ~inputs.region_padding[index]
        assert_close(encoded.text[index, text], expected["text"])
        assert_close(encoded.regions[index, regions], expected["regions"])
        assert_close(encoded.pooled[index], expected["pooled"])
        assert_close(ours.token_logits(encoded.text[index, text]), expected["words"])
        assert_close(ours.match_logits(encoded)[index], expected["match"])
        objects = ours.region_predictions(encoded.regions[index, regions])["objects"]
        assert_close(objects, expected["objects"])
    assert {name.split(".")[0] for name in report.new} == {"answer_head"}
    assert report.ignored == ()


def test_the_published_layout_loads_completely() -> None:
    config = VilbertConfig()
    shapes = published_tensors(config)
    assert len(shapes) == 533
    with torch.device("meta"):
        model = Vilbert(config)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 250_044_029
    del tensors["cls.predictions.decoder.weight"]  # its values cannot be compared here
    report = load_weights(model, tensors, "original")
    assert report.new == ()
    assert report.ignored == ()
    _, saved = to_saved(config, dict(model.named_parameters()))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        name: shape for name, shape in shapes.items() if name != "cls.predictions.decoder.weight"
    }


def test_heads_of_other_benchmarks_are_left_out_and_the_answer_head_is_read() -> None:
    config = vilbert_config()
    shapes = published_tensors(config)
    hidden = 2 * config.co_width
    shapes |= {
        "vil_prediction.logit_fc.0.weight": (hidden, config.co_width),
        "vil_prediction.logit_fc.0.bias": (hidden,),
        "vil_prediction.logit_fc.2.weight": (hidden,),
        "vil_prediction.logit_fc.2.bias": (hidden,),
        "vil_prediction.logit_fc.3.weight": (ANSWERS, hidden),
        "vil_prediction.logit_fc.3.bias": (ANSWERS,),
        "vil_logit.weight": (1, config.co_width),
        "linguisic_logit.bias": (1,),
    }
    tensors = drawn(shapes)
    ours = Vilbert(config).eval()
    report = load_weights(ours, tensors, "original")
    assert report.new == ()
    assert report.ignored == ("linguisic_logit.bias", "vil_logit.weight")
    inputs = batch()
    encoded = ours.encode(inputs)
    name = "vil_prediction.logit_fc"
    equations = VilbertEquations(tensors, config)
    inner = equations.norm(
        f"{name}.2", F.gelu(equations.linear(f"{name}.0", encoded.pooled.detach()))
    )
    assert_close(ours.answer_logits(encoded, inputs).detach(), equations.linear(f"{name}.3", inner))


def test_saved_model_is_read_back_unchanged() -> None:
    ours = randomise(Vilbert(vilbert_config()))
    document, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    again, report = from_saved(document, tensors)
    assert again.config == ours.config
    assert report.new == ()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])


def test_only_the_maps_that_nothing_passes_through_have_no_gradient() -> None:
    ours = randomise(Vilbert(vilbert_config())).train()
    inputs = batch()
    encoded = ours.encode(inputs)
    loss = ours.token_logits(encoded.text.flatten(0, 1)).square().sum()
    loss = loss + ours.match_logits(encoded).square().sum()
    loss = loss + ours.answer_logits(encoded, inputs).square().sum()
    loss = loss + ours.region_predictions(encoded.regions)["objects"].square().sum()
    torch.autograd.backward(loss)
    silent = {name for name, parameter in ours.named_parameters() if parameter.grad is None}
    assert silent == {
        f"connections.{index}.attention.unused_{stream}.{part}"
        for index in (0, 1)
        for stream in ("text", "region")
        for part in ("weight", "bias")
    }
    assert all(
        parameter.requires_grad is (name not in silent)
        for name, parameter in ours.named_parameters()
    )


@torch.no_grad()
def test_attention_maps_hold_both_directions_of_co_attention() -> None:
    ours = randomise(Vilbert(vilbert_config()))
    inputs = batch()
    maps = ours.encode(inputs, attention=True).attention
    assert maps is not None
    assert [tuple(each.shape) for each in maps] == [(2, 4, 11, 11)] * 2
    assert maps[0][:, :, :6, :6].abs().max() == 0.0
    assert_close(maps[0][:, :, 6:, :6].sum(-1), torch.ones(2, 4, 5))
    whole_image = 1 - maps[0][:, :, :6, 6:].sum(-1)
    assert bool((whole_image > 0).all())


@torch.no_grad()
def test_what_a_masked_region_holds_is_not_told_by_the_mean() -> None:
    ours = randomise(Vilbert(vilbert_config()))
    inputs = batch()
    masked = torch.zeros_like(inputs.region_padding)
    masked[0, 2] = True
    other = inputs.features.clone()
    other[0, 2] += 1.0
    first = ours._embed_regions(replace(inputs, masked_regions=masked))[:, 0]
    second = ours._embed_regions(replace(inputs, features=other, masked_regions=masked))[:, 0]
    assert torch.equal(first, second)
    assert not torch.equal(first, ours._embed_regions(inputs)[:, 0])


@pytest.mark.parametrize("connections", [(3, 2), (2, 4), (2,)])
def test_connections_that_do_not_fit_are_refused(connections: tuple[int, ...]) -> None:
    document, _ = to_saved(vilbert_config(), {})
    with pytest.raises(ModelError, match="connections"):
        from_saved(document | {"t_biattention_id": connections}, {})


def test_text_cannot_be_written_by_this_family() -> None:
    model = build(vilbert_config())
    inputs: Inputs = batch()
    with pytest.raises(ModelError, match="prefix"):
        model.encode(inputs, mask="prefix")
