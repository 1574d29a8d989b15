"""LLaVA-1.5 in vLLM."""

import math

from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class LlavaQuestions(Questions, llava.LlavaMultiModalProcessor):
    marker = "image_token_index"


@MULTIMODAL_REGISTRY.register_processor(
    LlavaQuestions, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlava(Pruned, llava.LlavaForConditionalGeneration):
    def grid(self, n_visual: int, shape: None) -> tuple[int, int]:
        side = math.isqrt(n_visual)
        return side, side
