"""Qwen3-VL with a mixture of experts in vLLM."""

from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.mrope import MRoPE
from mipruner_vllm.processor import Questions


class Qwen3VLMoeQuestions(Questions, qwen3_vl.Qwen3VLMultiModalProcessor):
    placeholders = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMoeQuestions, info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLMoe(MRoPE, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    pass
