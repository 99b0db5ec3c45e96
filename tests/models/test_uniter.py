"""UNITER against the published equations, over the published tensor names."""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.families import from_saved, load_weights, to_saved
from pipeline.models.uniter import Uniter, UniterConfig
from tests.models.equations import Equations
from tests.models.examples import (
    ANSWERS,
    FEATURES,
    OBJECTS,
    WIDTH,
    WORDS,
    assert_close,
    batch,
    randomise,
    row,
    uniter_config,
)


def published_tensors(config: UniterConfig) -> dict[str, Tensor]:
    """Draws the tensors of UniterForPretraining, with the answer head of its VQA model."""
    generator = torch.Generator().manual_seed(6)
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        tensors[name] = 0.2 * torch.randn(shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str, width: int = WIDTH) -> None:
        draw(f"{name}.weight", width)
        draw(f"{name}.bias", width)

    inner = config.intermediate_size
    draw("uniter.embeddings.word_embeddings.weight", WORDS, WIDTH)
    draw("uniter.embeddings.position_embeddings.weight", config.max_positions, WIDTH)
    draw("uniter.embeddings.token_type_embeddings.weight", 2, WIDTH)
    norm("uniter.embeddings.LayerNorm")
    linear("uniter.img_embeddings.img_linear", WIDTH, FEATURES)
    linear("uniter.img_embeddings.pos_linear", WIDTH, 7)
    draw("uniter.img_embeddings.mask_embedding.weight", 2, FEATURES)
    for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm"):
        norm(f"uniter.img_embeddings.{name}")
    for index in range(config.num_layers):
        layer = f"uniter.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", WIDTH, WIDTH)
        linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, WIDTH)
        linear(f"{layer}.output.dense", WIDTH, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("uniter.pooler.dense", WIDTH, WIDTH)
    linear("cls.predictions.transform.dense", WIDTH, WIDTH)
    norm("cls.predictions.transform.LayerNorm")
    draw("cls.predictions.bias", WORDS)
    tensors["cls.predictions.decoder.weight"] = tensors["uniter.embeddings.word_embeddings.weight"]
    linear("feat_regress.net.0", WIDTH, WIDTH)
    norm("feat_regress.net.2")
    tensors["feat_regress.weight"] = tensors["uniter.img_embeddings.img_linear.weight"]
    draw("feat_regress.bias", FEATURES)
    linear("region_classifier.net.0", WIDTH, WIDTH)
    norm("region_classifier.net.2")
    linear("region_classifier.net.3", OBJECTS, WIDTH)
    linear("itm_output", 2, WIDTH)
    linear("vqa_output.0", 2 * WIDTH, WIDTH)
    norm("vqa_output.2", 2 * WIDTH)
    linear("vqa_output.3", ANSWERS, 2 * WIDTH)
    return tensors


class UniterEquations(Equations):
    """The published forward pass of one sample without padding."""

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.norm(f"{name}.2", self.gelu(self.linear(f"{name}.0", x)))

    def __call__(
        self, tokens: Tensor, features: Tensor, boxes: Tensor, masked: Tensor, config: UniterConfig
    ) -> dict[str, Tensor]:
        """Maps tokens (T,), features (R, F), boxes (R, 4) and masked (R,) to every head."""
        regions = "uniter.img_embeddings"
        features = features.clone()
        features[masked] += self.tensors[f"{regions}.mask_embedding.weight"][1]
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        locations = torch.cat([boxes, torch.stack([width, height, width * height], dim=1)], dim=1)
        seen = self.norm(
            f"{regions}.img_layer_norm", self.linear(f"{regions}.img_linear", features)
        )
        placed = self.linear(f"{regions}.pos_linear", locations)
        placed = self.norm(f"{regions}.pos_layer_norm", placed)
        segment = self.tensors["uniter.embeddings.token_type_embeddings.weight"][1]
        image = self.norm(f"{regions}.LayerNorm", seen + placed + segment)
        states = torch.cat([self.text("uniter.embeddings", tokens), image])
        for index in range(config.num_layers):
            states = self.layer(f"uniter.encoder.layer.{index}", states, config.num_heads)
        pooled = torch.tanh(self.linear("uniter.pooler.dense", states[0]))
        text, image = states[: len(tokens)], states[len(tokens) :]
        words = self.norm(
            "cls.predictions.transform.LayerNorm",
            self.gelu(self.linear("cls.predictions.transform.dense", text)),
        )
        return {
            "words": words @ self.tensors["uniter.embeddings.word_embeddings.weight"].T
            + self.tensors["cls.predictions.bias"],
            "match": self.linear("itm_output", pooled),
            "answers": self.linear("vqa_output.3", self.head("vqa_output", pooled)),
            "objects": self.linear(
                "region_classifier.net.3", self.head("region_classifier.net", image)
            ),
            "features": self.head("feat_regress.net", image) @ self.tensors["feat_regress.weight"]
            + self.tensors["feat_regress.bias"],
        }


@torch.no_grad()
def test_every_head_gives_what_the_published_equations_give() -> None:
    config = uniter_config()
    tensors = published_tensors(config)
    ours = Uniter(config).eval()
    report = load_weights(ours, tensors, "original")
    assert report.new == ()
    assert report.ignored == ()
    inputs = batch()
    masked = torch.zeros_like(inputs.region_padding)
    masked[0, 1] = masked[1, 2] = True
    inputs = replace(inputs, masked_regions=masked)
    encoded = ours.encode(inputs)
    for index in range(2):
        alone = row(inputs, index)
        text, regions = ~inputs.token_padding[index], ~inputs.region_padding[index]
        expected = UniterEquations(tensors)(
            alone.tokens[0], alone.features[0], alone.boxes[0], masked[index, regions], config
        )
        predicted = ours.region_predictions(encoded.regions[index, regions])
        assert_close(ours.token_logits(encoded.text[index, text]), expected["words"])
        assert_close(ours.match_logits(encoded)[index], expected["match"])
        assert_close(ours.answer_logits(encoded, inputs)[index], expected["answers"])
        assert_close(predicted["objects"], expected["objects"])
        assert_close(predicted["features"], expected["features"])


def test_saved_model_is_read_back_unchanged() -> None:
    ours = randomise(Uniter(uniter_config()))
    document, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    again, report = from_saved(document, tensors)
    assert again.config == ours.config
    assert report.new == ()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])


def test_the_feature_head_shares_the_embeddings_weight() -> None:
    model = Uniter(uniter_config())
    assert model.feature_head.weight is model.region_embeddings.feature.weight
