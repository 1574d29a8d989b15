"""Finds T, the tokens of the user's latest question, in the token ids of a rendered prompt.

`Pipeline` has the user's text before rendering (`Adapter.tokenize`). ``generate`` gets only ids. With a tokenizer, the
text around the question is known from its chat template. Without one, only special ids can be distinguished from text.

Positions in a text count characters without blanks, because decoders add and remove blanks.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mipruner.errors import InputError

A, B, C = (f"\N{LEFT WHITE CURLY BRACKET}{letter}\N{RIGHT WHITE CURLY BRACKET}" for letter in "abc")
"""Placeholders for the texts of user and assistant while a conversation is rendered."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Character that a decoder writes for an incomplete byte sequence."""


def without_blanks(text: str) -> str:
    return "".join(text.split())


@dataclass
class Reader:
    """Finds questions in token ids, by the text that a tokenizer's chat template writes around them.

    Attributes
    ----------
    tokenizer : PreTrainedTokenizerBase
    template : str, optional
        The chat template. Without one, `latest` cannot find the begin and end of a turn.
    placeholders : sequence of str
        Texts of images, and around them, in a rendered conversation.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    placeholders: Sequence[str] = ()

    @cached_property
    def turn(self) -> tuple[str, str]:
        """Text before and after the user's text in every turn. Empty if the template does not show it."""
        first = self._render([("user", A)], add_generation_prompt=True)
        if first is None or first.count(A) != 1:
            return "", ""
        before, after = first.split(A)
        answered = self._render([("user", A), ("assistant", B)])
        if answered is not None and B in answered:
            after = _common(after, answered.split(A)[1].split(B)[0])
        later = self._render([("user", A), ("assistant", B), ("user", C)], add_generation_prompt=True)
        if later is None or later.count(C) != 1:
            return "", after
        between = later.split(C)[0]
        between = between[max(between.rfind(said) + len(said) for said in (A, B) if said in between) :]
        return _common(before[::-1], between[::-1])[::-1], after

    def _render(self, said: Sequence[tuple[str, str]], **options: Any) -> str | None:
        """Render a conversation about one image, without blanks and placeholders."""
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in said
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        try:
            options |= {"chat_template": self.template, "tokenize": False}
            text = cast(str, self.tokenizer.apply_chat_template(messages, **options))
        except (TemplateError, TypeError):  # one that takes no such conversation
            return None
        for placeholder in self.placeholders:
            text = text.replace(placeholder, "")
        return without_blanks(text)

    def latest(self, ids: Tensor, is_visual: Tensor) -> Tensor:
        """Mask [S] of the last user turn's text in ``ids`` [S]: the text after its last image, or all of it."""
        prompt = ids[~is_visual].tolist()
        start, end, _ = self._latest(prompt)
        return self._tokens(ids, is_visual, prompt, start, end)

    def is_open(self, ids: Tensor, is_visual: Tensor) -> bool:
        """Whether the end of the last user turn is missing in ``ids`` [S], as in a prompt that was split."""
        return self._latest(ids[~is_visual].tolist())[2]

    def _latest(self, prompt: list[int]) -> tuple[int, int, bool]:
        """Begin and end of the last user turn in the decoded prompt, and whether the end is missing."""
        written = without_blanks(self.decode(prompt))
        opening, closing = self.turn
        start = written.rfind(opening) + len(opening) if opening and opening in written else 0
        is_open = bool(closing) and closing not in written[start:]
        end = written.find(closing, start) if closing and not is_open else len(written)
        return start, end, is_open

    def occurrence(self, ids: Tensor, is_visual: Tensor, text: str) -> Tensor:
        """Mask [S] of the last occurrence of ``text`` in ``ids`` [S].

        Raises
        ------
        InputError
            If the text is empty or not in the prompt.
        """
        prompt = ids[~is_visual].tolist()
        written = without_blanks(self.decode(prompt))
        wanted = without_blanks(self.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        start = written.rfind(wanted)
        if not wanted or start < 0:
            raise InputError(f"the text {text!r} is not in the prompt")
        return self._tokens(ids, is_visual, prompt, start, start + len(wanted), everywhere=True)

    def _tokens(
        self, ids: Tensor, is_visual: Tensor, prompt: list[int], start: int, end: int, everywhere: bool = False
    ) -> Tensor:
        """Mask [S] of the tokens of the characters start..end of the decoded prompt."""
        lengths = range(len(prompt) + 1)
        # The token that completes a character ends it, the token of its first byte begins it.
        first = bisect_right(lengths, start, key=lambda k: len(without_blanks(self.decode(prompt[:k])))) - 1
        last = bisect_left(lengths, end, key=lambda k: len(without_blanks(self.decode(prompt[:k]).rstrip(INCOMPLETE))))
        around = cast(list[int], self.tokenizer.convert_tokens_to_ids(list(self.placeholders)))
        special = {*self.tokenizer.all_special_ids, *around}
        places = (~is_visual).nonzero()[:, 0].tolist()
        spoken = [k for k in range(max(first, 0), last) if prompt[k] not in special]
        if not everywhere and is_visual.any():
            behind = [k for k in spoken if places[k] > int(is_visual.nonzero()[-1])]
            spoken = behind if any(self.decode([prompt[k]]).strip() for k in behind) else spoken
        while spoken and not self.decode([prompt[spoken[0]]]).strip():
            spoken = spoken[1:]
        is_text = torch.zeros_like(is_visual)
        is_text[[places[k] for k in spoken]] = True
        return is_text

    def words(self, ids: Tensor, is_text: Tensor) -> list[str]:
        """The tokens of T as strings, see `Features.words`."""
        prompt, words = ids.tolist(), []
        for k in is_text.nonzero()[:, 0].tolist():
            before, upto = (self.decode(prompt[max(0, k - 8) : end]) for end in (k, k + 1))
            own = upto[len(before) :]
            blank = not before or before[-1:].isspace() or own[:1].isspace()
            words.append(" " * blank + own.strip())
        return words

    def decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cast(str, self.tokenizer.decode(ids, **options))


def between_special(ids: Tensor, is_visual: Tensor, ends: Iterable[int], special: Iterable[int]) -> Tensor:
    """Mask [S] of the text between the last image and the next end-of-text token, role words included."""
    start = int(is_visual.nonzero()[-1]) + 1
    place = torch.arange(len(ids), device=ids.device)
    end = place[(place >= start) & torch.isin(ids, ids.new_tensor(sorted(ends)))]
    is_text = (place >= start) & (place < (int(end[0]) if len(end) else len(ids)))
    return is_text & ~torch.isin(ids, ids.new_tensor(sorted(special)))


def _common(one: str, other: str) -> str:
    """The longest common prefix."""
    n = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:n]
