"""Text side of a prompt: chat template, token ids, text of an answer."""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mipruner.errors import InputError, PromptError
from mipruner.prompt import Prompt, Tokens

TEXT = "\N{LEFT WHITE CURLY BRACKET}text\N{RIGHT WHITE CURLY BRACKET}"
"""Placeholder for the user's text while the template is rendered."""

END_OF_THINKING = "</think>"


class Chat:
    """Renders and tokenizes prompts, and decodes answers.

    The text of the user contains no control tokens: a string such as ``</s>`` or ``<|im_end|>`` in it is tokenized as
    characters. Control tokens of the template are kept.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    placeholders : dict of str
        Text that the chat template writes for an "image" and for a "video".
    placeholder_ids : collection of int
        Token ids that are replaced by image rows.
    prompt : str, optional
        Template with ``{image}`` and ``{text}`` instead of the tokenizer's chat template. The text before and after an
        image is then tokenized separately, as in the original LLaVA code.
    system : str, optional
        System message for the chat template; by default that of the template.
    thinking : bool
        Ask the chat template for thinking, and use the text after the thinking as the answer.

    Raises
    ------
    InputError
        If there is neither a chat template nor ``prompt``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        placeholders: Mapping[str, str],
        placeholder_ids: Collection[int],
        prompt: str | None = None,
        system: str | None = None,
        thinking: bool = False,
    ):
        if prompt is None and tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template: give prompt, a template with {image} and {text}")
        self.tokenizer, self.placeholders = tokenizer, placeholders
        self.placeholder_ids = sorted(placeholder_ids)
        self.prompt, self.system, self.thinking = prompt, system, thinking

    def render(self, kinds: Sequence[str]) -> tuple[str, str]:
        """Text of the prompt before and after the user's text, with one placeholder for each "image" or "video"."""
        if self.prompt is not None:
            rendered = self.prompt.format(image="".join(self.placeholders[kind] for kind in kinds), text=TEXT)
        else:
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": TEXT}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
            options: dict[str, Any] = dict(add_generation_prompt=True, tokenize=False, enable_thinking=self.thinking)
            rendered = str(self.tokenizer.apply_chat_template(messages, **options))
        before, after = rendered.split(TEXT)
        return before, after

    def check_text(self, prompt: Prompt) -> None:
        """Check the text of one prompt before it is batched with others.

        Raises
        ------
        PromptError
            If the text is empty, contains a placeholder, or consists of characters that the tokenizer does not know.
        """
        query = prompt.text if prompt.query is None else prompt.query
        of_sample = f" of sample {prompt.sample!r}" if prompt.sample else ""
        if not query.strip():
            raise PromptError(f"the question{of_sample} is empty")
        for placeholder in (*self.tokenizer.convert_ids_to_tokens(self.placeholder_ids), *self.placeholders.values()):
            if placeholder in prompt.text:
                raise PromptError(f"the text{of_sample} contains the placeholder {placeholder!r}")
        ids, _ = self._encode(query, (0, len(query)), add_special_tokens=False)
        if not set(ids) - set(self.tokenizer.all_special_ids):
            raise PromptError(f"the tokenizer knows none of the characters of the question{of_sample}: {query!r}")

    def check_kinds(self, kinds: Sequence[str]) -> None:
        """Raise `InputError` if the template does not show every "image" or "video"."""
        self._fill(self.render(kinds), [""] * len(kinds), " and ".join(f"one {kind}" for kind in kinds))

    def tokenize(self, prompt: Prompt, kinds: Sequence[str], layouts: Sequence[tuple[str, list[int]]]) -> Tokens:
        """Render and tokenize one prompt.

        ``layouts`` holds, for each image or video, the text that replaces its placeholder, and the number of rows that
        each placeholder token in that text stands for.

        Raises
        ------
        InputError
            If the text does not contain the query or the question, if the template leaves images out, or as in
            `check_text`.
        """
        self.check_text(prompt)
        query = prompt.text if prompt.query is None else prompt.query
        question = prompt.text if prompt.question is None else prompt.question
        for part in (query, question):
            if part not in prompt.text:
                raise InputError(f"{part!r} is not part of the text {prompt.text!r}")

        before, after = self._fill(self.render(kinds), [text for text, _ in layouts])
        rendered = before + prompt.text + after
        ids, offsets = self._tokenize_text(rendered, (len(before), len(before) + len(prompt.text)))

        def within(part: str) -> Tensor:
            start = len(before) + prompt.text.index(part)
            return (offsets[:, 1] > start) & (offsets[:, 0] < start + len(part)) & (offsets[:, 1] > offsets[:, 0])

        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        is_text = within(query) & ~torch.isin(ids, special)
        words = [
            " " * (a == 0 or rendered[a - 1 : a + 1].strip() != rendered[a - 1 : a + 1]) + rendered[a:b].strip()
            for a, b in offsets[is_text].tolist()
        ]
        counts = torch.ones_like(ids)
        is_placeholder = torch.isin(ids, torch.tensor(self.placeholder_ids))
        counts[is_placeholder] = torch.tensor([n for _, runs in layouts for n in runs], dtype=counts.dtype)
        return Tokens(
            ids.repeat_interleave(counts),
            is_text.repeat_interleave(counts),
            within(question)[is_text],
            words,
            self.tokenizer,
        )

    def _fill(self, parts: Sequence[str], texts: Sequence[str], what: str = "") -> list[str]:
        """Parts of a rendered prompt, with its placeholders replaced by these texts."""
        placeholder = _pattern(self.placeholders.values())
        found = sum(len(placeholder.findall(part)) for part in parts)
        if found != len(texts):
            raise InputError(
                f"the chat template writes {found} placeholders for {what or f'{len(texts)} images'}: give prompt, a "
                "template with {image} and {text}"
            )
        rest = iter(texts)
        return [placeholder.sub(lambda match: next(rest), part) for part in parts]

    def _tokenize_text(self, rendered: str, own: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Ids [S] and their character ranges in ``rendered`` [S, 2]. ``own`` is the range of the user's characters."""
        ids, offsets, start, pieces = [], [], 0, [rendered]
        if self.prompt is not None:
            tokens = _pattern(self.tokenizer.convert_ids_to_tokens(self.placeholder_ids))
            pieces = re.split(f"({tokens.pattern})", rendered)
        bos = self.tokenizer.bos_token
        for k, piece in enumerate(pieces):
            with_bos = k == 0 and not (bos and rendered.startswith(bos))
            found, places = self._encode(piece, (own[0] - start, own[1] - start), add_special_tokens=with_bos)
            ids += found
            offsets += [(start + a, start + b) for a, b in places]
            start += len(piece)
        return torch.tensor(ids), torch.tensor(offsets)

    def _encode(
        self, text: str, own: tuple[int, int], add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their character ranges in ``text``, without control tokens that begin in the range ``own``."""
        tokens = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for k, (a, b) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            begin = b - len(text[a:b].lstrip())
            if k in self.control_ids and own[0] <= begin < own[1] and text[begin:b].strip():
                pieces, within = self._spell(text[a:b])
                ids += pieces
                places += [(a + start, a + end) for start, end in within]
            else:
                ids.append(k)
                places.append((a, b))
        return ids, places

    @cached_property
    def control_ids(self) -> set[int]:
        """Ids of control tokens that their text is tokenized to. A padding token such as ``!`` counts as text."""
        return {k for k, token in self.tokenizer.added_tokens_decoder.items() if token.special and len(str(token)) > 1}

    @cached_property
    def _speller(self) -> Tokenizer:
        """A copy of the tokenizer without control tokens. It is a copy because other threads may use the tokenizer."""
        speller = copy.deepcopy(self.tokenizer.backend_tokenizer)
        speller.encode_special_tokens = True
        speller.no_padding()
        speller.no_truncation()
        return speller

    def _spell(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of ``text`` as characters; the unknown token for a control token that is a word."""
        encoded = self._speller.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.unk_token_id
        ids = [unknown if k in self.control_ids else k for k in encoded.ids]
        return [k for k in ids if k is not None], [
            p for k, p in zip(ids, encoded.offsets, strict=True) if k is not None
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer without blanks at its ends. Unfinished thinking gives an empty answer."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        if self.thinking:
            text = text.rpartition(END_OF_THINKING)[2] if END_OF_THINKING in text else ""
        return text.strip()


def _pattern(texts: Collection[str]) -> re.Pattern[str]:
    """Regular expression that matches any of ``texts``."""
    return re.compile("|".join(map(re.escape, texts)))
