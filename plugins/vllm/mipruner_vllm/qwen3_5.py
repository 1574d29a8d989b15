"""Qwen3.5 in vLLM."""

from vllm.model_executor.models import qwen3_5, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.mrope import MRoPE
from mipruner_vllm.processor import Questions


class Qwen35Questions(Questions, qwen3_vl.Qwen3VLMultiModalProcessor):
    placeholders = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


@MULTIMODAL_REGISTRY.register_processor(
    Qwen35Questions, info=qwen3_5.Qwen3_5ProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen35(MRoPE, qwen3_5.Qwen3_5ForConditionalGeneration):
    pass
