"""SmolVLM in vLLM."""

from vllm.model_executor.models import idefics3, smolvlm
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class SmolVLMQuestions(Questions, idefics3.Idefics3MultiModalProcessor):
    placeholders = ("<image>", "<fake_token_around_image>", "<global-img>")
    is_scored_by_tile = True


@MULTIMODAL_REGISTRY.register_processor(
    SmolVLMQuestions, info=smolvlm.SmolVLMProcessingInfo, dummy_inputs=smolvlm.SmolVLMDummyInputsBuilder
)
class PrunedSmolVLM(Pruned, smolvlm.SmolVLMForConditionalGeneration):
    tiles = "num_patches"
