"""LXMERT: attention fusion by layers in which two encoded streams read each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from pipeline.models import blocks, layouts
from pipeline.models.base import MaskKind, Size
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.packed import PackedLayout
from pipeline.models.two_stream import TwoStream, TwoStreamConfig, text_layout


class LxmertConfig(TwoStreamConfig):
    """Sizes of an LXMERT; the defaults are the published one, but for its 9500 answers."""

    text_layers: Size = Field(default=9, description="layers of text alone")
    region_layers: int = Field(default=5, description="layers of regions alone")
    cross_layers: Size = Field(
        default=5, description="layers in which text and regions see each other"
    )
    num_objects: Size = Field(
        default=1600,
        description="object classes of Visual Genome, as the published detector has them",
    )
    num_attributes: Size = Field(
        default=400,
        description="attribute classes of Visual Genome, as the published detector has them",
    )


class CrossModalityLayer(nn.Module):
    """Cross-attention, then each stream's own self-attention and feed-forward."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        width, num_heads, dropout = config.width, config.num_heads, config.dropout
        self.cross = blocks.CrossAttention(width, num_heads, dropout)
        self.text_attention = blocks.SelfAttention(width, num_heads, dropout)
        self.text_feed_forward = blocks.FeedForward(width, config.intermediate_size, dropout)
        self.region_attention = blocks.SelfAttention(width, num_heads, dropout)
        self.region_feed_forward = blocks.FeedForward(width, config.intermediate_size, dropout)

    def forward(
        self, text: Tensor, regions: Tensor, text_layout: PackedLayout, region_layout: PackedLayout
    ) -> tuple[Tensor, Tensor, tuple[blocks.Heads, ...]]:
        """Maps text and regions, each as its layout packs it, to the same shapes.

        Also returns the heads of cross-attention, text and regions, then of self-attention.
        """
        text, regions, text_cross, region_cross = self.cross(
            text, regions, text_layout, region_layout
        )
        text, text_self = self.text_attention(text, text_layout)
        regions, region_self = self.region_attention(regions, region_layout)
        text, regions = self.text_feed_forward(text), self.region_feed_forward(regions)
        return text, regions, (text_cross, region_cross, text_self, region_self)


class RegionHead(nn.Module):
    """Predicts a region's object, attribute and feature from its state."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        self.transform = blocks.HeadTransform(config.width)
        self.objects = nn.Linear(config.width, config.num_objects)
        self.attributes = nn.Linear(config.width, config.num_attributes)
        self.features = nn.Linear(config.width, config.feature_dim)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (N, D) to (N, objects), (N, attributes) and (N, F)."""
        states = self.transform(states)
        return self.objects(states), self.attributes(states), self.features(states)


class Lxmert(TwoStream):
    """LXMERT (arXiv:1908.07490). Regions need their boxes.

    The first row of each table of the text's embeddings stays as it is in training: of words,
    positions and segments, as in its authors' code, which declares all three to be padding's. So
    the first position and the only segment that is used are what they were when training began;
    the first word, [PAD], learns as the decoder's weight.
    """

    config: LxmertConfig

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config, pooled_width=config.width)
        text = self.text_embeddings
        for table in (text.word, text.position, text.token_type):
            table.padding_idx = 0
        self.cross_layers = nn.ModuleList(
            CrossModalityLayer(config) for _ in range(config.cross_layers)
        )
        self.pooler = blocks.Pooler(config.width)
        self.match_head = nn.Linear(config.width, 2)
        self.region_head = RegionHead(config)
        blocks.initialise(self, config.initializer_range)

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        """Encodes a batch; attention maps are those of the cross-modality layers."""
        self.require_mask(mask)
        text_layout, region_layout = (
            PackedLayout.of(inputs.token_padding),
            PackedLayout.of(inputs.region_padding),
        )
        text = self.text_states(inputs, text_layout)
        regions = self.region_states(inputs, region_layout)
        maps = []
        for layer in self.cross_layers:
            text, regions, heads = self.run_layer(layer, text, regions, text_layout, region_layout)
            if attention:
                maps.append(_map(heads, text_layout.mask, region_layout.mask))
        text, regions = text_layout.pad(text), region_layout.pad(regions)
        return Encoded(text, regions, self.pooler(text[:, 0]), tuple(maps) if attention else None)

    def region_predictions(self, states: Tensor) -> dict[str, Tensor]:
        objects, attributes, features = self.region_head(states)
        return {"objects": objects, "attributes": attributes, "features": features}


def _map(heads: tuple[blocks.Heads, ...], text_mask: Tensor, region_mask: Tensor) -> Tensor:
    """Lays a layer's cross- and self-attention side by side, (B, H, T+R, T+R)."""
    text_cross, region_cross, text_self, region_self = heads
    return blocks.joint_map(
        blocks.attention_map(text_self.query, text_self.key, text_mask),
        blocks.attention_map(text_cross.query, region_cross.key, region_mask),
        blocks.attention_map(region_cross.query, text_cross.key, text_mask),
        blocks.attention_map(region_self.query, region_self.key, region_mask),
    )


def transformers_layout(config: LxmertConfig) -> Layout:
    """transformers' `lxmert`: ForPreTraining, of which the other classes read what they have."""
    return _layout(config, encoder="lxmert")


def original_layout(config: LxmertConfig) -> Layout:
    """The `.pth` files of github.com/airsplay/lxmert."""
    return _layout(config, encoder="bert")


def bert_layout(config: LxmertConfig) -> Layout:
    """BERT's own files, which fill the text encoder from their first layers."""
    return text_layout(config, pooler="pooler", optional=("cross_layers", "region_head"))


def _layout(config: LxmertConfig, encoder: str) -> Layout:
    embeddings = f"{encoder}.embeddings"
    regions = f"{encoder}.encoder.visn_fc"
    head_names, tied = layouts.token_head("token_head", "cls.predictions", embeddings)
    cross: layouts.Names = {}
    for index in range(config.cross_layers):
        ours, theirs = f"cross_layers.{index}", f"{encoder}.encoder.x_layers.{index}"
        both = f"{theirs}.visual_attention"
        cross |= layouts.attention(f"{ours}.cross", f"{both}.att", f"{both}.output")
        for mine, other in (("text", "lang"), ("region", "visn")):
            own = f"{theirs}.{other}_self_att"
            cross |= layouts.attention(f"{ours}.{mine}_attention", f"{own}.self", f"{own}.output")
            cross |= layouts.feed_forward(
                f"{ours}.{mine}_feed_forward", f"{theirs}.{other}_inter", f"{theirs}.{other}_output"
            )
    return Layout(
        prefix=f"{encoder}.",
        names={
            **layouts.text_embeddings("text_embeddings", "text_norm", embeddings),
            **layouts.linear("region_embeddings.feature", f"{regions}.visn_fc"),
            **layouts.linear("region_embeddings.feature_norm", f"{regions}.visn_layer_norm"),
            **layouts.linear("region_embeddings.box", f"{regions}.box_fc"),
            **layouts.linear("region_embeddings.box_norm", f"{regions}.box_layer_norm"),
            **layouts.transformer_layers(
                "text_layers", f"{encoder}.encoder.layer", config.text_layers
            ),
            **layouts.transformer_layers(
                "region_layers", f"{encoder}.encoder.r_layers", config.region_layers
            ),
            **cross,
            **layouts.linear("pooler.dense", f"{encoder}.pooler.dense"),
            **head_names,
            **layouts.linear("match_head", "cls.seq_relationship"),
            **layouts.answer_head("answer_head", "answer_head.logit_fc"),
            **layouts.transform("region_head.transform", "obj_predict_head.transform"),
            **layouts.linear("region_head.objects", "obj_predict_head.decoder_dict.obj"),
            **layouts.linear("region_head.attributes", "obj_predict_head.decoder_dict.attr"),
            **layouts.linear("region_head.features", "obj_predict_head.decoder_dict.feat"),
        },
        tied=tied,
        optional=("token_head", "match_head", "answer_head", "region_head"),
    )


def to_transformers(config: LxmertConfig, answers: Sequence[str]) -> dict[str, Any]:
    """Returns the `config.json` of transformers' `lxmert`."""
    return {
        "model_type": "lxmert",
        "architectures": ["LxmertForPreTraining"],
        **layouts.bert_sizes(config),
        "l_layers": config.text_layers,
        "r_layers": config.region_layers,
        "x_layers": config.cross_layers,
        "visual_feat_dim": config.feature_dim,
        "num_object_labels": config.num_objects,
        "num_attr_labels": config.num_attributes,
        "num_qa_labels": config.num_answers or 1,  # transformers builds a head of at least one
        "task_qa": config.num_answers > 0,
        **layouts.labels(config.num_answers, answers),
    }


def from_transformers(document: Mapping[str, Any]) -> LxmertConfig:
    """Reads transformers' `config.json`, or raises ModelError for what this family cannot do."""
    layouts.require(document, "visual_pos_dim", 4)
    return LxmertConfig(
        **layouts.from_bert_sizes(document),
        text_layers=layouts.whole(document, "l_layers", 9),
        region_layers=layouts.whole(document, "r_layers", 5, least=0),
        cross_layers=layouts.whole(document, "x_layers", 5),
        feature_dim=layouts.whole(document, "visual_feat_dim", 2048),
        num_objects=layouts.whole(document, "num_object_labels", 1600),
        num_attributes=layouts.whole(document, "num_attr_labels", 400),
        num_answers=layouts.whole(
            document, "num_answers" if "num_answers" in document else "num_qa_labels", 9500, least=0
        ),
    )
