"""What a pruner sees: one picture after the projector, and the words it is asked about."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Everything known about one picture (or one video) before the language model runs.

    Tensors may carry the same leading batch dimensions; a pruner never sees the model they come from.

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
    sample : str
        Name of the sample, so that a random choice is the same in every run and in every batch.
    """

    visual: Tensor
    text: Tensor
    grid: tuple[int, ...] | None = None
    attention: Tensor | None = None
    sample: str = ""

    @property
    def n_visual(self) -> int:
        return self.visual.shape[-2]

    @property
    def n_text(self) -> int:
        return self.text.shape[-2]
