"""CLIP embeddings of patches and text, for CDPruner on models whose vision encoder is that of a CLIP."""

from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPTextConfig, PreTrainedTokenizerBase

from mipruner.errors import ModelError
from mipruner.models.hub import locate
from mipruner.models.weights import load_weights


class ClipSpace:
    """Text tower and projections of a CLIP. The vision encoder is that of the model.

    Parameters
    ----------
    clip : CLIPModel
    tokenizer : PreTrainedTokenizerBase
    """

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        self.clip, self.tokenizer = clip, tokenizer

    @classmethod
    def load(cls, path: str, like: Tensor) -> "ClipSpace":
        """Load from a folder or the hub (``id`` or ``id@revision``) to the device of ``like``, in float32 as in
        CDPruner's code.

        Raises
        ------
        ModelError
            If it is missing, exists only as a pickle, or its weights are not those of a CLIP.
        """
        name, _, revision = path.partition("@")
        folder = locate(name, revision or None)
        try:
            clip = load_weights(CLIPModel, folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ModelError(f"cannot load {path} from {folder}: {str(error).strip().splitlines()[0]}") from error
        del cast(Any, clip).vision_model.encoder
        return cls(clip.to(like.device).eval(), tokenizer)  # type: ignore[arg-type]

    def visual(self, hidden: Tensor) -> Tensor:
        """Embeddings [.., d_clip] of patches from the encoder layer [.., d_encoder] that the projector reads."""
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden.float()))

    def text(self, question: str) -> Tensor:
        """Embeddings [n_segments, d_clip] of a question, cut into segments of the text tower's length (77 tokens)."""
        length = cast(CLIPTextConfig, self.clip.config.text_config).max_position_embeddings
        ids = torch.tensor(self.tokenizer(question, verbose=False)["input_ids"], device=self.clip.device)
        segments = ids.new_zeros(-(-len(ids) // length), length)
        segments.view(-1)[: len(ids)] = ids
        mask = torch.arange(segments.numel(), device=ids.device).view_as(segments) < len(ids)
        pooled = self.clip.text_model(input_ids=segments, attention_mask=mask.long()).pooler_output
        return self.clip.text_projection(pooled)
