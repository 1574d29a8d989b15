"""Question-aware pruning of image tokens inside vLLM, enabled by one setting.

    vllm serve MODEL --hf-overrides '{"mipruner": {"pruner": "mi", "keep": 0.25, "options": {"lam": 0.5}}}'

The classes are registered under vLLM's own architecture names, so the config of a checkpoint does not change. Without
the setting they behave like the classes that they replace.
"""

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "llava_next:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:PrunedLlavaOnevision",
    "InternVLForConditionalGeneration": "internvl:PrunedInternVL",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:PrunedQwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe:PrunedQwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5:PrunedQwen35",
    "Gemma3ForConditionalGeneration": "gemma3:PrunedGemma3",
    "Mistral3ForConditionalGeneration": "mistral3:PrunedMistral3",
    "SmolVLMForConditionalGeneration": "smolvlm:PrunedSmolVLM",
}
"""vLLM's architecture -> module and class here, one module per family. vLLM imports only the served one."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: vLLM calls it in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from mipruner_vllm.settings import checked

    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not hasattr(stock, "checks_mipruner"):
            MODELS_CONFIG_MAP[architecture] = checked(stock)
