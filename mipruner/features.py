"""Input of a pruner: the projected tokens of one image, and the tokens of its question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of one image (or one video) before the language model runs.

    All tensors may have the same leading batch dimensions. A pruner has no access to the model. Optional fields are
    computed only for methods that name them in `Pruner.needs` or `Pruner.wants`.

    Attributes
    ----------
    visual : Tensor [.., n_visual, d]
        Projected visual tokens V, eq. 1.
    text : Tensor [.., n_text, d]
        Input-embedding rows of the user's text T, eq. 2: no system prompt, role words or special tokens.
    grid : tuple of int, optional
        (rows, columns) of the visual tokens, or (frames, rows, columns) for a video.
    attention : Tensor [.., n_visual], optional
        Attention that each visual token receives in the vision encoder, mean over heads (eq. 5).
    attention_to_self : Tensor [.., n_visual], optional
        The terms j = i, which eq. 5 excludes, on the scale of `attention`. Only for encoders without CLS.
    hidden : Tensor [.., n_visual, d_encoder], optional
        Input of the projector; if the projector merges patches, their mean.
    cls_hidden : Tensor [.., n_cls, d_encoder], optional
        CLS rows of the same layer, one per image. None if the encoder has no CLS.
    keys : Tensor [.., n_visual, d_head], optional
        Keys of the layer that `attention` comes from, mean over heads, patches of a token averaged.
    project : callable, optional
        The projector, [.., d_encoder] -> [.., d], for methods that merge rows of `hidden`.
    clip_visual, clip_text : Tensor [.., n_visual, d_clip] and [.., n_segments, d_clip], optional
        CLIP embeddings of the patches, and of the question in segments of 77 tokens. None if the model does not name
        its CLIP.
    words : sequence of str, optional
        The n_text text tokens as strings, with a blank before the first token of a word. In a batch, one sequence per
        sample.
    question : bool Tensor [.., n_text], optional
        False for the text tokens of the answer-format sentence and other instructions around the question.
    prefixed : callable, optional
        Function of a prefix. Returns the input-embedding rows [n, d] of prefix and text, tokenized together.
    vocabulary : Tensor [n_vocabulary, d], optional
        Input-embedding table of the language model, without batch dimensions.
    vocabulary_norm : Tensor [n_vocabulary], optional
        Norms of its rows in float32, see `mipruner.fused.row_norm`.
    valid : bool Tensor [.., n_visual], optional
        False for patches that are entirely padding of a square image.
    sample : str
        Name of the sample. It seeds random choices, so they do not depend on run or batch.
    held : dict, optional
        Results computed from this image alone, stored for further questions, see `mipruner.fused.once`. None in a
        batch.
    """

    visual: Tensor
    text: Tensor
    grid: tuple[int, ...] | None = None
    attention: Tensor | None = None
    attention_to_self: Tensor | None = None
    hidden: Tensor | None = None
    cls_hidden: Tensor | None = None
    keys: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    clip_visual: Tensor | None = None
    clip_text: Tensor | None = None
    words: Sequence[Any] | None = None
    question: Tensor | None = None
    prefixed: Callable[[str], Tensor] | None = None
    vocabulary: Tensor | None = None
    vocabulary_norm: Tensor | None = None
    valid: Tensor | None = None
    sample: str = ""
    held: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def n_visual(self) -> int:
        return self.visual.shape[-2]

    @property
    def n_text(self) -> int:
        return self.text.shape[-2]
