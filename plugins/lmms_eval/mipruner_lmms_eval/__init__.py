"""Registers pruned models as the model ``mipruner`` of lmms-eval.

    lmms-eval --model mipruner --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=mi,keep=64,lam=1 --tasks pope

lmms-eval finds `manifest` by its entry point. Tasks, prompts and scores are those of lmms-eval. See docs/anywhere.md.
"""


def manifest():
    """Description of the model for lmms-eval. It is called during the import of lmms-eval, so that cannot be imported
    above.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mipruner", simple_class_path="mipruner_lmms_eval.model.Pruned")
