"""LLaVA-NeXT in vLLM."""

from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.newlines import NewlineQuestions, Newlines


class LlavaNextQuestions(NewlineQuestions, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextQuestions, info=llava_next.LlavaNextProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaNext(Newlines, llava_next.LlavaNextForConditionalGeneration):
    pass
