"""Mistral 3 in vLLM."""

from vllm.model_executor.models import mistral3
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class Mistral3Questions(Questions, mistral3.Mistral3MultiModalProcessor):
    placeholders, marker = ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), "image_token_index"


@MULTIMODAL_REGISTRY.register_processor(
    Mistral3Questions, info=mistral3.Mistral3ProcessingInfo, dummy_inputs=mistral3.Mistral3DummyInputsBuilder
)
class PrunedMistral3(Pruned, mistral3.Mistral3ForConditionalGeneration):
    pass
