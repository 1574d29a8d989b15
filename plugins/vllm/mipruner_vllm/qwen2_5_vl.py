"""Qwen2.5-VL in vLLM."""

from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.mrope import MRoPE
from mipruner_vllm.processor import Questions


class Qwen25VLQuestions(Questions, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    placeholders = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
    video_marker = "video_token_id"


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLQuestions, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen25VL(MRoPE, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    pass
