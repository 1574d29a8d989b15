"""Answers a batch of prompts: image, question -> Features -> Selection -> short prompt -> language model -> answer."""

from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mipruner.decoding import Decoding, decode, prefill
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models.adapter import Adapter
from mipruner.prompt import Encoded, Media, Prompt, Short, Smaller, Visual, collate, identity
from mipruner.pruners import DecoderPruner, ImagePruner, Method, Pruner
from mipruner.selection import Auto, Selection, grid_within, split_budget
from mipruner.short_prompt import Prompts
from mipruner.shortening import Shortening, of_prefill
from mipruner.timing import Stopwatch


@dataclass(frozen=True)
class Answer:
    """Answer, kept tokens and token counts of one prompt.

    Attributes
    ----------
    text : str
    tokens : list of int
        New tokens, without end-of-text.
    selections : list of Selection
        Kept tokens of each image, on the CPU; those of the last layer if the method prunes inside the decoder.
    n_visual : list of int
        Visual tokens of each image before pruning.
    n_keep : int
        Nominal budget of the prompt.
    grids : list of (rows, columns) or (frames, rows, columns), or None
        See `Visual.grid`.
    boxes : list of (left, top, right, bottom)
        Part of each image that its grid covers, in pixels; larger than the image if it was padded.
    visual_tokens_per_layer : list of int
        Visual tokens in each layer of the language model, including rows that are always kept.
    notes : dict of str
        See `Method.notes`.
    """

    text: str
    tokens: list[int]
    selections: list[Selection]
    n_visual: list[int]
    n_keep: int
    grids: list[tuple[int, ...] | None]
    boxes: list[tuple[float, float, float, float]]
    visual_tokens_per_layer: list[int]
    notes: dict[str, str] = field(default_factory=dict)


class VisionCache:
    """Cache of encoded images by object identity, up to ``max_bytes``; the least recently used one is removed first.

    Each image is stored with the names of its requested signals, because an image may not have all of them.
    """

    def __init__(self, max_bytes: int = 2**30):
        self.max_bytes = max_bytes
        # With the image, so that its id is not used again.
        self._held: OrderedDict[tuple[int, ...], tuple[Media, Visual, frozenset[str]]] = OrderedDict()

    def signals(self, image: Media) -> frozenset[str]:
        """Names of the signals that are stored for ``image``."""
        return self._held[identity(image)][2] if identity(image) in self._held else frozenset()

    def get(self, image: Media, signals: Set[str] = frozenset()) -> Visual | None:
        """The stored result of ``image`` if it has these ``signals``, else None."""
        key = identity(image)
        if key not in self._held or not signals <= self.signals(image):
            return None
        self._held.move_to_end(key)
        return self._held[key][1]

    def put(self, image: Media, visual: Visual, signals: Set[str] = frozenset()) -> None:
        key = identity(image)
        self._held[key] = (image, visual, frozenset(signals))
        self._held.move_to_end(key)
        while len(self._held) > 1 and sum(visual.n_bytes for _, visual, _ in self._held.values()) > self.max_bytes:
            self._held.popitem(last=False)


class Pipeline:
    """A model with a pruner and a budget: ``pipeline(prompts)`` answers a batch.

    Only one call at a time may run on an adapter, because hooks are set on shared modules during a call. ``pruner`` and
    ``keep`` may be replaced between calls.

    Parameters
    ----------
    adapter : Adapter
        From `mipruner.models.load`.
    pruner : Pruner, DecoderPruner or ImagePruner
    keep : int, float or Auto
        Budget per prompt, see `mipruner.selection.budget`. Several images share it in proportion to their tokens. With
        `Auto`, the share of an image is the upper limit of its budget.
    decoding : Decoding
    """

    def __init__(
        self,
        adapter: Adapter,
        pruner: Method,
        keep: int | float | Auto,
        decoding: Decoding | None = None,
    ):
        self.adapter, self.pruner, self.keep = adapter, pruner, keep
        self.decoding = decoding or Decoding()
        self.cache = VisionCache()
        self._prepared: dict[int, tuple[Media, dict[str, Any]]] = {}
        self.watch = Stopwatch(adapter.device)
        if isinstance(pruner, ImagePruner):
            self.check_sizes()

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer ``prompts``. Adds the time of each stage to ``watch``.

        Raises
        ------
        InputError
            If a question is empty, the budget does not fit, or the features are not finite.
        """
        if isinstance(self.pruner, ImagePruner):
            prompts = self.smaller(prompts)
        seen = self.see([image for prompt in prompts for image in prompt.images])
        with self.watch("scoring"):
            encoded = [
                self.adapter.read(prompt, [seen[id(image)] for image in prompt.images], self.pruner.signals)
                for prompt in prompts
            ]
            batch = collate([whole(sample) for sample in encoded])
            valid = torch.ones_like(batch.is_visual) if batch.attention_mask is None else batch.attention_mask.bool()
            chosen, selections = self.choose(encoded, valid)
        repack = self.adapter.positions == "repack"
        with Shortening(self.adapter.language_model, self.pruner, of_prefill(chosen), repack) as run:
            with self.watch("prefill"):
                state = prefill(self.adapter, batch)
            with self.watch("decode"):
                tokens = decode(self.adapter, batch, state, self.decoding)
        if not isinstance(self.pruner, DecoderPruner):
            budgets = [sum(selection.n_rows for selection in chosen) for chosen in selections]
            per_layer = [[n] * self.adapter.n_layers for n in budgets]
        else:
            budgets = [self.pruner.budget(self.keep, sample.n_visual) if sample.visuals else 0 for sample in encoded]
            per_layer, selections = run.per_layer, [per_image(*pair) for pair in zip(run.kept, encoded, strict=True)]
        return [
            Answer(
                text=self.adapter.chat.decode(new),
                tokens=new,
                selections=[Selection(s.indices.cpu()) for s in chosen],
                n_visual=[
                    image.n_visual if isinstance(image, Smaller) else visual.n_visual
                    for image, visual in zip(prompt.images, sample.visuals, strict=True)
                ],
                n_keep=n_keep,
                grids=[visual.grid for visual in sample.visuals],
                boxes=[self.adapter.box(image.size) for image in prompt.images],
                visual_tokens_per_layer=[sample.n_fixed + n for n in layers],
                notes=self.pruner.notes(sample.features()[0]) if sample.visuals else {},
            )
            for prompt, new, sample, chosen, n_keep, layers in zip(
                prompts, tokens, encoded, selections, budgets, per_layer, strict=True
            )
        ]

    def prepare(self, images: Sequence[Media]) -> None:
        """Run the image processor on images before a call with the same objects. May run in another thread."""
        if isinstance(self.pruner, ImagePruner):  # the size of a resized image depends on its prompt
            for image in images:
                self.adapter.n_visual(image)
            return
        for image in images:
            self._prepared[id(image)] = (image, self._pixels(image))

    def check_sizes(self) -> None:
        """Raise `InputError` if the number of visual tokens does not depend on the image size."""
        if not self.adapter.any_size:
            raise InputError(
                f"a {self.adapter.model.config.model_type} model scales every image to sizes of its own, so that a "
                "smaller image saves nothing: use downsample, which averages its tokens"
            )

    def smaller(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with images resized to at most the budget of tokens, for an `ImagePruner`."""
        self.check_sizes()
        if isinstance(self.keep, Auto):
            raise InputError(f"keep=auto reads the PMI with the text, which {type(self.pruner).__name__} does not know")
        made: dict[tuple[int, int], Media] = {}
        found = []
        for prompt in prompts:
            counts = [self.adapter.n_visual(image) for image in prompt.images]
            n_keep = split_budget(self.pruner.budget(self.keep, sum(counts)), counts) if counts else []
            for image, n, count in zip(prompt.images, n_keep, counts, strict=True):
                assert isinstance(image, Image.Image)  # `n_visual` refuses videos
                grid = grid_within(n, image.height, image.width)
                made.setdefault((id(image), n), image if n == count else Smaller(image, grid, count))
            images = [made[id(image), n] for image, n in zip(prompt.images, n_keep, strict=True)]
            found.append(replace(prompt, images=images))
        return found

    def see(self, images: Sequence[Media]) -> dict[int, Visual]:
        """Run the vision encoder once on every distinct image. Returns the results by ``id``.

        An image is encoded again if its stored result lacks a signal that the pruner reads. Then both old and new
        signals are stored.
        """
        distinct = {id(image): image for image in images}
        held = {key: self.cache.get(image, self.pruner.signals) for key, image in distinct.items()}
        visuals = {key: visual for key, visual in held.items() if visual is not None}
        new = {key: image for key, image in distinct.items() if key not in visuals}
        if new:
            signals = self.pruner.signals.union(*map(self.cache.signals, new.values()))
            pixels = [self._pixels(image) for image in new.values()]
            with self.watch("vision"):
                encoded = self.adapter.encode(pixels, signals)
            for (key, image), visual in zip(new.items(), encoded, strict=True):
                visuals[key] = visual
                self.cache.put(image, visual, signals)
        return visuals

    def _pixels(self, image: Media) -> dict[str, Any]:
        prepared, pixels = self._prepared.pop(id(image), (None, {}))
        if prepared is image:
            return pixels
        self.adapter.kinds([image])  # a video to a family without videos is an error of the user's
        return self.adapter.preprocess(image)

    def select(self, encoded: Encoded) -> list[Selection]:
        """The `Selection` for each image of one prompt, with its share of the budget.

        All tokens if the method prunes only inside the decoder.
        """
        if not encoded.visuals:
            return []
        counts = [visual.n_visual for visual in encoded.visuals]
        every = [Selection(torch.arange(n, device=self.adapter.device)) for n in counts]
        if isinstance(self.pruner, ImagePruner):
            return every
        n_keep = self.pruner.budget(self.keep, sum(counts))
        pairs = list(zip(encoded.features(), split_budget(n_keep, counts), strict=True))
        if isinstance(self.keep, Auto):
            pairs = [(features, self.enough(features, n)) for features, n in pairs]
        if isinstance(self.pruner, Pruner):
            return [self.pruner(features, n) for features, n in pairs]
        assert isinstance(self.pruner, DecoderPruner)
        for features, n in pairs:
            self.pruner.check(features, n)
        if self.pruner.before is None:
            return every
        entering = split_budget(self.pruner.n_entering(sum(counts), n_keep), counts)
        return [self.pruner.before(features, n) for (features, _), n in zip(pairs, entering, strict=True)]

    def enough(self, features: Features, n_max: int) -> int:
        """Budget of one image for keep=auto."""
        assert isinstance(self.keep, Auto)
        self.pruner.check(features, n_max)
        return min(n_max, self.keep.enough(self.pruner.s_cross(features)))

    def choose(self, encoded: Sequence[Encoded], valid: Tensor) -> tuple[Prompts, list[list[Selection]]]:
        """Select tokens of left-padded prompts. ``valid`` [B, S] is False at padding."""
        with torch.no_grad():
            selections = [self.select(sample) for sample in encoded]
        is_visual = torch.zeros_like(valid)
        for row, real, sample in zip(is_visual, valid, encoded, strict=True):
            row[real.nonzero()[:, 0][sample.is_visual]] = True
        if not isinstance(self.pruner, DecoderPruner):
            return Prompts(is_visual, encoded=encoded, selections=selections), selections
        prompts = Prompts(is_visual, [self.nominal(sample) for sample in encoded])
        if "attention" in self.pruner.needs:
            prompts.attention = [
                torch.cat([v.signals["attention"][s.indices] for v, s in zip(sample.visuals, chosen, strict=True)])
                if sample.visuals
                else None
                for sample, chosen in zip(encoded, selections, strict=True)
            ]
        if self.pruner.before is not None:
            prompts.encoded, prompts.selections = encoded, selections
        return prompts, selections

    def nominal(self, sample: Encoded) -> int:
        """Nominal budget of one prompt for a method inside the decoder."""
        assert isinstance(self.pruner, DecoderPruner)
        n = sample.n_visual
        return self.pruner.nominal(n, self.pruner.budget(self.keep, n), self.adapter.n_layers) if n else 0


def whole(sample: Encoded) -> Short:
    """A prompt with all tokens kept."""
    layers = zip(*(visual.deepstack for visual in sample.visuals), strict=True)
    return Short(
        ids=sample.ids,
        embeds=sample.embeds,
        position_ids=sample.position_ids,
        is_visual=sample.is_visual,
        deepstack=tuple(torch.cat(layer) for layer in layers),
        sample=sample.sample,
    )


def per_image(kept: Tensor, encoded: Encoded) -> list[Selection]:
    """Convert indices among the visual tokens of a prompt to indices within each image."""
    start, selections = 0, []
    for visual in encoded.visuals:
        end = start + visual.n_visual
        selections.append(Selection(kept[(kept >= start) & (kept < end)] - start))
        start = end
    return selections
