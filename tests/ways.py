"""What a row of the table of ways is held to: the explicit route, stock transformers, and prompts built by hand.

    make ways        # python -m pytest -p tests.ways tests/test_table_of_ways.py

As a pytest plug-in it runs every way with every method on both demo models (with ``ON_DEMO=0`` on tiny random ones) and
writes the table of docs/anywhere.md from what the tests say. Without it (``make test``) each way runs once, on a tiny
model.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mipruner
from analysis.pages import replace as fill
from experiments.benchmarks.demo import Demo
from mipruner import PRUNERS
from mipruner.decoding import State, prefill, step
from mipruner.errors import InputError
from mipruner.models import Adapter, Prompt, load
from mipruner.pipeline import Pipeline, whole
from mipruner.prompt import Encoded, collate
from mipruner.pruners import DecoderPruner
from mipruner.shortening import shorten
from tiny import make_image, tiny

ROOT = Path(__file__).resolve().parent.parent
ON_DEMO = "ON_DEMO"
FAMILIES, METHODS = ("llava", "qwen3_vl"), ("mi", "vispruner", "fastv", "sparsevlm")
N, KEEP = 4, 0.25
ROUTE = "equal to the explicit route"
STOCK = "equal to the unpruned model"


@cache
def adapter_of(family: str, on_demo: bool) -> Adapter:
    if not on_demo:
        return tiny(family)
    return load(ROOT / "experiments/demo" / family.replace("_", ""), dtype="float32")


@cache
def prompts_of(family: str, on_demo: bool) -> tuple[Prompt, ...]:
    """Two prompts with an image each, of different length, and where the family has it of another size."""
    if not on_demo:
        images = [make_image(0, 84, 84), make_image(1, 112, 70)]
        return tuple(map(Prompt, ("What color is it ?", "Which of the two is larger ?"), [[image] for image in images]))
    demo = Demo()
    first = {sample.image_id: sample.text for sample in demo.samples()[::-1]}
    images = [demo.images(k)[0] for k in ("0", "1")]
    images[1] = images[1].resize((308, 252))
    longer = f"{first['1']} {first['2']}"
    return Prompt(first["0"], [images[0]]), Prompt(longer, [images[1]])


Draw = Callable[[Tensor, Tensor], Tensor]


def likeliest(logits: Tensor, said: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


@dataclass
class Case:
    """One cell: a way of calling, for one method on one model."""

    family: str
    name: str
    on_demo: bool

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_of(self.family, self.on_demo)

    @property
    def model(self):
        return self.adapter.model

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return prompts_of(self.family, self.on_demo)

    @property
    def inside(self) -> bool:
        """Whether the method drops tokens inside the decoder."""
        return issubclass(PRUNERS[self.name], DecoderPruner)

    def own(self) -> "Case":
        """The same with a model that may be changed."""
        case, adapter = replace(self), self.adapter
        model = deepcopy(adapter.model)
        case.adapter = type(adapter)(model, adapter.tokenizer, adapter.image_processor)
        if hasattr(adapter, "frame_size"):
            case.adapter.frame_size = adapter.frame_size
        return case

    def fresh(self) -> "Case":
        """The same with a model that was never called."""
        case, make = replace(self), adapter_of if self.on_demo else tiny
        case.adapter = make.__wrapped__(self.family, *[True] * self.on_demo)
        return case

    def prune(self, model=None, **options):
        options = {"tokenizer": self.adapter.tokenizer, **options}
        return mipruner.prune(self.model if model is None else model, self.name, options.pop("keep", KEEP), **options)

    def inputs(self, prompts: Sequence[Prompt] | None = None) -> dict[str, Tensor]:
        """What a processor gives for prompts, padded on the left."""
        prompts = self.prompts if prompts is None else prompts
        images = [image for prompt in prompts for image in prompt.images]
        pixels = {id(image): self.adapter.preprocess(image) for image in images}
        seen = {key: self.adapter.encode([one])[0] for key, one in pixels.items()}
        rows = [self.adapter.tokenize(prompt, [seen[id(image)] for image in prompt.images]).ids for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
        found = {
            "input_ids": ids,
            "attention_mask": torch.stack([torch.arange(length) >= length - len(r) for r in rows]),
        }
        for one in pixels.values():
            kind = "video" if "times" in one else "image"
            values = "pixel_values_videos" if kind == "video" else "pixel_values"
            parts = {values: one["pixel_values"].to(self.model.dtype)}
            parts |= {f"{kind}_grid_thw": one["grid_thw"]} if "grid_thw" in one else {}
            for name, x in parts.items():
                found[name] = torch.cat([found[name], x]) if name in found else x
        found["attention_mask"] = found["attention_mask"].long()
        if self.family == "qwen3_vl":
            kinds = self.adapter.placeholder_ids
            found["mm_token_type_ids"] = ((ids == kinds["image"]).int() + 2 * (ids == kinds["video"]).int()).int()
        return found

    def generate(self, prompts=None, inputs=None, model=None, **options) -> list[list[int]]:
        """New tokens, without an end of text."""
        inputs = self.inputs(prompts) if inputs is None else inputs
        options = {"max_new_tokens": N, "min_new_tokens": N, "do_sample": False, **options}
        out = (self.model if model is None else model).generate(**inputs, **options)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    # The explicit route.

    def encoded(self, prompts: Sequence[Prompt] | None = None) -> list[Encoded]:
        pipeline = Pipeline(self.adapter, PRUNERS[self.name](), KEEP)
        prompts = self.prompts if prompts is None else prompts
        seen = pipeline.see([image for prompt in prompts for image in prompt.images])
        signals = pipeline.pruner.signals
        return [self.adapter.read(prompt, [seen[id(i)] for i in prompt.images], signals) for prompt in prompts]

    def shortened(self, encoded: Sequence[Encoded]):
        """The batch that enters the language model, and a context in which it is shortened further."""
        pipeline = Pipeline(self.adapter, PRUNERS[self.name](), KEEP)
        if not self.inside:
            return collate([self.adapter.shorten(one, pipeline.select(one)) for one in encoded]), nullcontext()
        batch, budgets = collate([whole(one) for one in encoded]), [pipeline.nominal(one) for one in encoded]
        return batch, shorten(self.adapter.language_model, pipeline.pruner, batch.is_visual, budgets)

    def logits(self, encoded: Sequence[Encoded], n_last: int = 1) -> Tensor:
        """Of the last rows of short prompts, [B, n_last, vocabulary]."""
        batch, inside = self.shortened(encoded)
        with inside:
            out = self.adapter.language_model(**batch.language_model_inputs())
        return self.model.lm_head(out.last_hidden_state[:, -n_last:]).float()

    def answers(self, prompts=None, draw: Draw = likeliest, said: Tensor | None = None, n=N, encoded=None, ends=False):
        """Tokens drawn from the logits of short prompts; the first ones are given by ``said`` [B, k]."""
        encoded = self.encoded(prompts) if encoded is None else encoded
        batch, inside = self.shortened(encoded)
        tokens = torch.empty(len(encoded), 0, dtype=torch.long)
        with inside:
            state: State = prefill(self.adapter, batch)
            for k in range(n + (0 if said is None else said.shape[1])):
                if k:
                    state = step(self.adapter, state, tokens[:, -1:])
                if not ends:
                    state.logits[:, self.adapter.tokenizer.eos_token_id] = -torch.inf
                given = said is not None and k < said.shape[1]
                tokens = torch.cat([tokens, said[:, k : k + 1] if given else draw(state.logits, tokens)], 1)
        return tokens[:, 0 if said is None else said.shape[1] :].tolist()

    @cached_property
    def expected(self) -> list[list[int]]:
        return expected(self.family, self.name, self.on_demo)


@cache
def expected(family: str, name: str, on_demo: bool) -> list[list[int]]:
    return Case(family, name, on_demo).answers()


def then(encoded: Encoded, ids: Sequence[int], adapter: Adapter) -> Encoded:
    """A prompt with more text behind it, which is not the user's."""
    more = torch.tensor(ids)
    ahead = encoded.position_ids[:, -1:] + 1 + torch.arange(len(ids))
    return replace(
        encoded,
        ids=torch.cat([encoded.ids, more]),
        embeds=torch.cat([encoded.embeds, adapter.model.get_input_embeddings()(more)]),
        position_ids=torch.cat([encoded.position_ids, ahead], 1),
        is_text=torch.cat([encoded.is_text, torch.zeros(len(ids), dtype=torch.bool)]),
    )


def without_question(encoded: Encoded) -> Encoded:
    """A prompt whose user says nothing."""
    rest = ~encoded.is_text
    return replace(
        encoded,
        ids=encoded.ids[rest],
        embeds=encoded.embeds[rest],
        position_ids=encoded.position_ids[:, : int(rest.sum())],
        is_text=encoded.is_text[rest],
    )


def refused(call: Callable, kind: type[Exception] | tuple = InputError) -> str:
    """The sentence of a refusal."""
    with pytest.raises(kind) as caught:
        call()
    return f"refused: {' '.join(str(caught.value).split('. ')[0].split())}"


# The page.

cells: dict[str, dict[tuple[str, str], str]] = {}


def pytest_configure(config):
    os.environ.setdefault(ON_DEMO, "1")


def pytest_runtest_logreport(report):
    for name, value in report.user_properties if report.when == "call" and report.passed else ():
        if name == "cell":
            way, family, method, says = value
            cells.setdefault(way, {})[family, method] = says


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and cells:
        path = ROOT / "docs/anywhere.md"
        path.write_text(fill(path.read_text(), "ways", table(cells)))


def table(cells: dict[str, dict[tuple[str, str], str]]) -> str:
    """Ways by methods; both models in one cell where they say the same."""
    lines = [
        f"| inside `with mipruner.prune(model, ...)` | {' | '.join(METHODS)} |",
        "| --- |" + " --- |" * len(METHODS),
    ]
    titles = dict(zip(FAMILIES, ("LLaVA", "Qwen3-VL"), strict=True))
    for way, found in cells.items():
        told = []
        for method in METHODS:
            says = [found[family, method] for family in FAMILIES]  # a cell that is missing is an error
            parts = (
                says[:1] if says[0] == says[1] else [f"{titles[f]}: {s}" for f, s in zip(FAMILIES, says, strict=True)]
            )
            told.append("; ".join(parts).replace("|", r"\|").replace("<", r"\<"))
        lines.append(f"| {way} | {' | '.join(told)} |")
    return "\n".join(lines)
