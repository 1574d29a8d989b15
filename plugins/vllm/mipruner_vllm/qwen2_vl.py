"""Qwen2-VL in vLLM."""

from vllm.model_executor.models import qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.mrope import MRoPE
from mipruner_vllm.processor import Questions


class Qwen2VLQuestions(Questions, qwen2_vl.Qwen2VLMultiModalProcessor):
    placeholders = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
    video_marker = "video_token_id"


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLQuestions, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(MRoPE, qwen2_vl.Qwen2VLForConditionalGeneration):
    pass
