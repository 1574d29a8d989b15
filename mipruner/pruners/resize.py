from dataclasses import dataclass

from mipruner.pruners.base import ImagePruner


@dataclass(frozen=True)
class ResizePruner(ImagePruner):
    """Resizing: resizes the image so that the vision encoder gives at most T tokens.

    The new size is that of the largest grid with at most T tokens and about the aspect ratio of the image. So the
    encoder is faster too. Only for families that take images of any size (Qwen-VL). Families with a fixed size (LLaVA,
    InternVL) are refused. VTC-Bench recommends it as a baseline for token compression.
    """

    title = "Resizing"
    reads = "nothing"
    reads_text = False
    cost = "none, and a cheaper encoder"
