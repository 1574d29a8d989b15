"""For `make test-vllm` with the CPU build of torch: what torchvision's wheel from PyPI defines in CUDA code.

Copied into that environment as ``sitecustomize.py``, because vLLM also imports torchvision in processes of its own.
"""

import sys
from importlib.abc import MetaPathFinder


class Definitions(MetaPathFinder):
    """Defines two operators just before torchvision is imported, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            torch.torchvision_definitions = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                torch.torchvision_definitions.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, Definitions())
