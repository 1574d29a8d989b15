"""Gemma 3 in vLLM."""

from vllm.model_executor.models import gemma3_mm
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class Gemma3Questions(Questions, gemma3_mm.Gemma3MultiModalProcessor):
    placeholders, marker = ("<start_of_image>", "<image_soft_token>", "<end_of_image>"), "boi_token_index"


@MULTIMODAL_REGISTRY.register_processor(
    Gemma3Questions, info=gemma3_mm.Gemma3ProcessingInfo, dummy_inputs=gemma3_mm.Gemma3DummyInputsBuilder
)
class PrunedGemma3(Pruned, gemma3_mm.Gemma3ForConditionalGeneration):
    tiles = "num_patches"
