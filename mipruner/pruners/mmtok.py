import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pmi import similarity
from mipruner.pruners.base import Pruner
from mipruner.selection import Auto, Selection, dense_greedy, lazy_greedy, take_rows

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an and answer are at be been being but by did do does for from had has have he how i if into is it onto or
        question she so the then they to upon was we were what when where which who why with you
        """,
    )
)
"""The 47 words of the method's published list."""


@dataclass(frozen=True)
class MMTokPruner(Pruner):
    """MMTok: greedy maximum coverage of the question's words and of the image's own tokens.

    A token covers a word by its share in a softmax over the visual tokens; the next pick is the token that adds most to
    the best coverage reached so far, summed over words and, at weight ``alpha``, over visual tokens.

    Patches of padding are never picked, but stay in both softmaxes and stay to be covered, each at weight 1 / N.

    The defaults are those of the public code for LLaVA. For Qwen it has tau_text=0.01, stop_words=false,
    prefix="Question: " and rounding=down, which conf/pruner/mmtok.yaml sets for that family.

    Differs from the public code in what is left once the unpadded patches are spent: padding then fills the budget.

    Parameters
    ----------
    tau_text, tau_visual : float
        Temperatures of the two softmaxes.
    alpha : float
        Weight of the coverage of visual tokens.
    stop_words : bool
        Whether words without content are left out of the question.
    prefix : str, optional
        Words put before the text for the choice alone. All of both is then to be covered, the answer-format sentence
        too; by default it is the question without that sentence.
    rounding : "nearest" or "down"
        How a fraction ``keep`` becomes a number of tokens.
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
        if not (self.tau_text > 0 and self.tau_visual > 0):
            raise InputError(f"the temperatures {self.tau_text} and {self.tau_visual} are not both positive")
        if self.prefix and self.stop_words:
            raise InputError("stop words are left out of the question alone: set stop_words=false with a prefix")
        if self.rounding not in ("nearest", "down"):
            raise InputError(f"unknown rounding {self.rounding!r}: choose nearest or down")

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        n_keep = super().budget(keep, n_visual)
        return max(1, int(keep * n_visual)) if self.rounding == "down" and isinstance(keep, float) else n_keep

    def select(self, features: Features, n_keep: int) -> Selection:
        return Selection(self.order(features, n_keep).sort(-1).values)

    def order(self, features: Features, n_keep: int) -> Tensor:
        assert features.hidden is not None
        valid = features.valid
        if valid is None:
            valid = torch.ones_like(features.visual[..., 0], dtype=torch.bool)
        text, weights = self.covered_text(features)
        of_text = similarity(text, features.visual).div_(self.tau_text).softmax(-1).mul_(weights[..., None])
        of_image = similarity(features.hidden, features.hidden).div_(self.tau_visual).softmax(-1)
        of_image.div_(valid.shape[-1]).mul_(self.alpha)
        cover = torch.cat([of_text.mT, of_image.mT], -1)  # row = what one token covers
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
        """Which text tokens [.., n_text] are to be covered: those of the question without stop words, or all if none
        remains.
        """
        every = torch.ones_like(features.text[..., 0], dtype=torch.bool)
        question = every if features.question is None else features.question
        question = torch.where(question.any(-1, keepdim=True), question, every)
        if not self.stop_words or features.words is None:
            return question
        content = question & torch.tensor(_content(features.words), device=question.device)
        return torch.where(content.any(-1, keepdim=True), content, question)


def facility_location(cover: Tensor, allowed: Tensor, n_keep: int) -> Tensor:
    """Greedy maximum of sum_u max_{v in S} cover[v, u]; tokens that are not allowed are picked last, by index. [..,
    n_keep]
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
    """For each token, or for each sample's tokens, whether it belongs to a content word."""
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
