"""The teacher: a frozen model that no optimizer or checkpoint knows of."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, ModelError
from pipeline.models import families
from pipeline.models.base import MaskKind, VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.pretrained.files import read_own, read_weights, require_unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Teacher:
    """A trained model of ours, in eval mode, on the device and in the precision of its student.

    Not a Module, and kept outside of every Module: neither an optimizer nor ZeRO, which would cut
    it into parts, finds its weights.
    """

    def __init__(self, folder: str) -> None:
        """Raises ModelError if the folder holds no whole model."""
        self.folder = folder
        try:
            own = read_own(folder)
            require_unchanged(folder, own)
            model, _ = families.from_saved(*read_weights(folder))
        except ModelError as error:
            raise ModelError(f"distill: teacher {error}") from error
        self.model: VisionLanguageModel = model.eval()
        self.model.requires_grad_(False)
        self.answers = tuple(own["answers"])

    def require_same_words(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Raises ConfigError if the teacher's token ids mean other words."""
        if load_tokenizer(self.folder).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"objectives.distill: teacher {self.folder} has another tokenizer; set "
                "model.tokenizer to the teacher's folder"
            )

    @torch.no_grad()
    def encode(self, inputs: Inputs, like: Tensor, mask: MaskKind, attention: bool) -> Encoded:
        """Encodes what the student sees, where and in the precision that `like` is."""
        self.model.to(like.device, like.dtype)
        return self.model.encode(inputs, mask=mask, attention=attention)
