from dataclasses import dataclass

from mipruner.pruners.base import ImagePruner


@dataclass(frozen=True)
class ResizePruner(ImagePruner):
    """Resizing: the image itself is resized until the vision encoder gives at most T tokens.

    Its new sides are those of the largest grid of at most T tokens that is about as wide for its height as the image.
    So the encoder's work falls too. Only for families that take images of any size (Qwen-VL); where the size is fixed
    (LLaVA, InternVL) it is refused. The baseline that published work on token compression is told to beat (VTC-Bench).
    """

    title = "Resizing"
    reads = "nothing"
    reads_text = False
    cost = "none, and a cheaper encoder"
