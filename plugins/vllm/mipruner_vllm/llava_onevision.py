"""LLaVA-OneVision in vLLM."""

from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.newlines import NewlineQuestions, Newlines


class LlavaOnevisionQuestions(NewlineQuestions, stock.LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionQuestions,
    info=stock.LlavaOnevisionProcessingInfo,
    dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(Newlines, stock.LlavaOnevisionForConditionalGeneration):
    pass
