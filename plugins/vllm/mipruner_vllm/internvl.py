"""InternVL3 in vLLM, for transformers checkpoints."""

from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class InternVLQuestions(Questions, interns1.InternS1MultiModalProcessor):
    placeholders = ("<img>", "<IMG_CONTEXT>", "</img>")


@MULTIMODAL_REGISTRY.register_processor(
    InternVLQuestions, info=interns1.InternS1ProcessingInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder
)
class PrunedInternVL(Pruned, interns1.InternS1ForConditionalGeneration):
    tiles = "image_num_patches"
