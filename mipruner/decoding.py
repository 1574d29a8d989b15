"""Generates tokens from a short prompt: one prefill, then a decode loop that calls the language model directly.

It gives the same tokens and logits as ``generate``. Prefill and decode are separate functions, so that each can be
timed. Qwen3-VL's deepstack rows are arguments of the prefill.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mipruner import draws
from mipruner.errors import InputError
from mipruner.models.adapter import Adapter
from mipruner.prompt import Batch


@dataclass(frozen=True)
class Decoding:
    """Decoding settings. Temperature 0 is greedy, as in the paper; Table 8 samples with top-p and top-k.

    Attributes
    ----------
    max_new_tokens : int
    temperature : float
    top_p : float
        1 is off.
    top_k : int
        0 is off.
    seed : int
        Seed of the draws, together with the sample's name. Draws do not depend on batch or device. A sample without a
        name is named by its index in the batch.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} is not positive")
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature} is negative: 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} is negative: 0 is off")

    def warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@dataclass
class State:
    """State between two decode steps: logits [B, vocabulary] of the next token, and the inputs of the next call."""

    logits: Tensor
    cache: object
    position_ids: Tensor
    attention_mask: Tensor | None


def prefill(adapter: Adapter, batch: Batch) -> State:
    """Run the prompt through the language model and fill its cache."""
    out = adapter.language_model(**batch.language_model_inputs(), use_cache=True)
    return State(
        logits=next_logits(adapter, out),
        cache=out.past_key_values,
        position_ids=batch.position_ids[..., -1:],
        attention_mask=batch.attention_mask,
    )


def step(adapter: Adapter, state: State, token: Tensor) -> State:
    """Append one token [B, 1] to every row."""
    position_ids, mask = state.position_ids + 1, state.attention_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    out = adapter.language_model(
        inputs_embeds=adapter.model.get_input_embeddings()(token),
        position_ids=position_ids,
        attention_mask=mask,
        past_key_values=state.cache,
        use_cache=True,
    )
    return State(next_logits(adapter, out), out.past_key_values, position_ids, mask)


def next_logits(adapter: Adapter, out: Any) -> Tensor:
    """Logits [B, vocabulary] of the last position, on the device of the embeddings if layers are on several devices."""
    return adapter.model.lm_head(out.last_hidden_state[:, -1:])[:, 0].to(adapter.device, torch.float32)


def inverse(p: Tensor, uniform: Tensor) -> Tensor:
    """The token [B, 1] at which the cumulated probability of p [B, vocabulary] exceeds uniform [B, 1] in [0, 1)."""
    cumulated = p.double().cumsum(-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp_max(p.shape[-1] - 1)


def end_ids(config: Any) -> list[int]:
    """Ids of end-of-text in a generation config."""
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def before_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first of ``ends``."""
    return tokens[: next((k for k, token in enumerate(tokens) if token in ends), len(tokens))]


def decode(adapter: Adapter, batch: Batch, state: State, decoding: Decoding) -> list[list[int]]:
    """Generate tokens until every row has ended. Returned rows end before their end-of-text token."""
    config = adapter.model.generation_config
    ends = torch.tensor(end_ids(config), device=adapter.device)
    penalties = [
        RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        for _ in batch.ids
        if config.repetition_penalty not in (None, 1.0)
    ]
    warpers = decoding.warpers()
    generators = [draws.generator(decoding.seed, sample or str(row)) for row, sample in enumerate(batch.samples)]
    rows = len(batch.embeds)
    drawn = torch.empty(rows, 0, dtype=torch.long, device=adapter.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=adapter.device)
    for k in range(decoding.max_new_tokens):
        if k:
            state = step(adapter, state, drawn[:, -1:])
        logits = state.logits
        for row, penalty in enumerate(penalties):
            seen = cast(torch.LongTensor, torch.cat([batch.ids[row], drawn[row]])[None])
            logits[row] = penalty(seen, logits[row : row + 1])[0]
        logits = warpers(cast(torch.LongTensor, drawn), logits)
        if decoding.temperature:
            uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators])
            token = inverse(logits.softmax(-1), uniform.to(logits.device))
        else:
            token = logits.argmax(-1, keepdim=True)
        drawn = torch.cat([drawn, token], 1)
        ended |= torch.isin(token[:, 0], ends)
        if ended.all():
            break
    is_end = torch.isin(drawn, ends).int()
    lengths = torch.where(is_end.any(1), is_end.argmax(1), drawn.shape[1])
    return [row[:length].tolist() for row, length in zip(drawn, lengths.tolist(), strict=True)]
