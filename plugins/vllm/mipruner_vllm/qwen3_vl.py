"""Qwen3-VL in vLLM."""

from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.mrope import MRoPE
from mipruner_vllm.processor import Questions


class Qwen3VLQuestions(Questions, qwen3_vl.Qwen3VLMultiModalProcessor):
    placeholders = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLQuestions, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(MRoPE, qwen3_vl.Qwen3VLForConditionalGeneration):
    pass
