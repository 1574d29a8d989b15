import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.fused import self_similarity
from mipruner.pmi import similarity
from mipruner.pruners.base import Pruner
from mipruner.selection import Auto, dense_greedy, lazy_greedy, take_rows

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an and answer are at be been being but by did do does for from had has have he how i if into is it onto or
        question she so the then they to upon was we were what when where which who why with you
        """,
    )
)
"""The 47 stop words of the public code."""


@dataclass(frozen=True)
class MMTokPruner(Pruner):
    """MMTok: greedy maximum coverage of the question's words and of the image's own tokens.

    The coverage of a word by a token is a softmax over the visual tokens. Each pick is the token that adds most to the
    best coverage so far, summed over words and, with weight ``alpha``, over visual tokens.

    Padding patches are never picked. They stay in both softmaxes and among the tokens to cover, each with weight 1 / N.

    The defaults are those of the public code for LLaVA. Its defaults for Qwen are tau_text=0.01, stop_words=false,
    prefix="Question: " and rounding=down; conf/pruner/mmtok.yaml sets them for that family.

    Differs from the public code if the budget exceeds the number of patches without padding: padding then fills it.

    Parameters
    ----------
    tau_text, tau_visual : float
        Temperatures of the two softmaxes.
    alpha : float
        Weight of the coverage of visual tokens.
    stop_words : bool
        Whether stop words are removed from the question.
    prefix : str, optional
        Text before the question, for the selection only. All of prefix and text is then to be covered, including the
        answer-format sentence. By default only the question without that sentence is covered.
    rounding : "nearest" or "down"
        Rounding of a fraction ``keep`` to a number of tokens.
    """

    title = "MMTok"
    paper = "https://arxiv.org/abs/2508.18264"
    reads = "question without stop words, features before the projector"
    cost = "N² d + T N²"

    tau_text: float = 0.02
    tau_visual: float = 0.2
    alpha: float = 0.5
    stop_words: bool = True
    prefix: str | None = None
    rounding: Literal["nearest", "down"] = "nearest"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    wants: ClassVar[frozenset[str]] = frozenset({"words", "question", "prefixed", "valid"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.tau_text > 0 and self.tau_visual > 0):
            raise InputError(f"the temperatures {self.tau_text} and {self.tau_visual} are not both positive")
        if self.prefix and self.stop_words:
            raise InputError("stop words are left out of the question alone: set stop_words=false with a prefix")

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        n_keep = super().budget(keep, n_visual)
        return max(1, int(keep * n_visual)) if self.rounding == "down" and isinstance(keep, float) else n_keep

    def order(self, features: Features, n_keep: int) -> Tensor:
        assert features.hidden is not None
        valid = features.valid
        if valid is None:
            valid = torch.ones_like(features.visual[..., 0], dtype=torch.bool)
        text, weights = self.covered_text(features)
        of_text = similarity(text, features.visual).div_(self.tau_text).softmax(-1).mul_(weights[..., None])
        of_image = self_similarity(features.hidden).div_(self.tau_visual).softmax(-1)
        of_image.div_(valid.shape[-1]).mul_(self.alpha)
        cover = torch.cat([of_text.mT, of_image.mT], -1)  # a row is the coverage by one token
        return facility_location(cover, valid, n_keep)

    def covered_text(self, features: Features) -> tuple[Tensor, Tensor]:
        """Text rows [.., m, d] to cover, and their weights [.., m]."""
        if self.prefix:
            if features.prefixed is None:
                raise InputError("MMTok's prefix is put before the text by its tokenizer, and none is known")
            text = features.prefixed(self.prefix)
            return text, text.new_full((len(text),), 1 / len(text), dtype=torch.float32)
        words = self.content(features)
        return features.text, words / words.sum(-1, keepdim=True)

    def content(self, features: Features) -> Tensor:
        """Mask [.., n_text] of text tokens to cover: the question without stop words, or all if none remains."""
        every = torch.ones_like(features.text[..., 0], dtype=torch.bool)
        question = every if features.question is None else features.question
        question = torch.where(question.any(-1, keepdim=True), question, every)
        if not self.stop_words or features.words is None:
            return question
        content = question & torch.tensor(_content(features.words), device=question.device)
        return torch.where(content.any(-1, keepdim=True), content, question)


def facility_location(cover: Tensor, allowed: Tensor, n_keep: int) -> Tensor:
    """Picks [.., n_keep] of the greedy maximum of sum_u max_{v in S} cover[v, u].

    Tokens that are not allowed are picked last, by index.
    """
    if cover.device.type == "cpu" and cover.dim() > 2:
        samples = zip(cover.flatten(0, -3), allowed.flatten(0, -2), strict=True)
        return torch.stack([facility_location(*s, n_keep) for s in samples]).view(*cover.shape[:-2], n_keep)
    best = torch.zeros_like(cover[..., 0, :])
    everywhere = cover.device.type == "cpu" and bool(allowed.all())

    def gains(index: Tensor | None = None) -> Tensor:
        rows = cover if index is None else take_rows(cover, index)
        added = (rows - best[..., None, :]).relu_().sum(-1)
        if everywhere:
            return added
        return added.masked_fill_(~(allowed if index is None else allowed.gather(-1, index)), -1)

    def add(pick: Tensor) -> None:
        torch.maximum(best, take_rows(cover, pick)[..., 0, :], out=best)

    if cover.device.type == "cpu":
        return lazy_greedy(gains, add, len(cover), n_keep)
    return dense_greedy(gains, add, n_keep)


def _content(words: Sequence[Any]) -> list[Any]:
    """Whether each token (of each sample) belongs to a content word."""
    if words and not isinstance(words[0], str):
        return [_content(sample) for sample in words]
    starts = [k == 0 or not word[:1].isalnum() or not words[k - 1][-1:].isalnum() for k, word in enumerate(words)]
    flags: list[bool] = []
    for k, start in enumerate(starts):
        if start:
            end = next((j for j in range(k + 1, len(words)) if starts[j]), len(words))
            word = re.sub(r"[^\w']", "", "".join(words[k:end])).lower()
            flags += [bool(re.search(r"\w", word)) and word not in STOP_WORDS] * (end - k)
    return flags
