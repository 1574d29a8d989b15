"""One method a file; `PRUNERS` is the list that tests, tables and `mipruner.prune` go by."""

from mipruner.pruners.attention import AttentionPruner
from mipruner.pruners.autoprune import AutoPruner
from mipruner.pruners.base import DecoderPruner, Pruner, ScorePruner
from mipruner.pruners.cdpruner import CDPruner
from mipruner.pruners.dart import DARTPruner
from mipruner.pruners.divprune import DivPruner
from mipruner.pruners.fastv import FastVPruner
from mipruner.pruners.mi import MIPruner
from mipruner.pruners.mi_attention import MIAttentionPruner
from mipruner.pruners.mmtok import MMTokPruner
from mipruner.pruners.none import NoPruner
from mipruner.pruners.random import RandomPruner
from mipruner.pruners.similarity import SimilarityPruner
from mipruner.pruners.sparsevlm import SparseVLMPruner
from mipruner.pruners.trimtokenator import TrimTokenatorPruner
from mipruner.pruners.visionzip import VisionZipPruner
from mipruner.pruners.vispruner import VisPruner

PRUNERS: dict[str, type[Pruner | DecoderPruner]] = {
    "none": NoPruner,
    "random": RandomPruner,
    "similarity": SimilarityPruner,
    "attention": AttentionPruner,
    "mi": MIPruner,
    "mi_attention": MIAttentionPruner,
    "visionzip": VisionZipPruner,
    "vispruner": VisPruner,
    "divprune": DivPruner,
    "cdpruner": CDPruner,
    "mmtok": MMTokPruner,
    "trimtokenator": TrimTokenatorPruner,
    "fastv": FastVPruner,
    "sparsevlm": SparseVLMPruner,
    "dart": DARTPruner,
    "autoprune": AutoPruner,
}

__all__ = ["PRUNERS", "DecoderPruner", "Pruner", "ScorePruner", *(cls.__name__ for cls in PRUNERS.values())]
