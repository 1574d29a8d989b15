"""Registers pruned models as one model of lmms-eval, with its own tasks, prompts and scores.

    lmms-eval --model mipruner --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=mi,keep=64,lam=1 --tasks pope

lmms-eval finds `manifest` by its entry point; see docs/anywhere.md.
"""


def manifest():
    """What lmms-eval is told of the model. It asks while it is being imported itself, so nothing of it is above."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mipruner", simple_class_path="mipruner_lmms_eval.model.Pruned")
