"""Adapter for any model that puts rows of its vision encoder into its prompt. It reads their layout from the call.

It cannot read inside the vision encoder. So it supports methods that read image rows, text, grid and vocabulary, in
`mipruner.prune` and, with the model's own processor, in `mipruner.processed`.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mipruner.errors import InputError, PromptError
from mipruner.intercept import Call
from mipruner.models.adapter import Adapter, VisionOutput
from mipruner.prompt import Media, Prompt, Video, Visual
from mipruner.pruners.base import Method

ROWS: dict[str, Callable[[Any, Any], Any]] = {
    "llama4": lambda owner, out: [owner.multi_modal_projector(image) for image in out.last_hidden_state],
    "fuyu": lambda owner, out: out.last_hidden_state,
    "granite4_vision": lambda owner, out: out.deepstack_features[0][1],
}
"""Functions that return the image rows if they are not in ``pooler_output``, by model type."""

PLACED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "molmo2": lambda embeds, rows, blank: torch.equal(embeds, blank + rows),
    "granite4_vision": lambda embeds, rows, blank: not embeds.any(),
}
"""Checks of the embeddings at the placeholders, by model type, if they are not the image rows themselves."""

OWN_GENERATE = {"janus"}
"""Model types whose own ``generate`` calls the one of transformers."""

ALONE = {"hunyuan_vl", "minicpmv4_6", "minicpmv4_7", "mistral_large4"}
"""Model types with other logits in a padded batch than alone, in transformers itself."""

_TESTED = """
    aria aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
    deepseek_vl_hybrid dots3_note emu3 ernie4_5_vl_moe exaone4_5 fast_vlm fuyu gemma3 gemma3n gemma4 gemma4_unified
    glm46v glm4v glm4v_moe glm5_next glm_ocr glmga got_ocr2 granite4_vision granite_docling hunyuan_vl
    hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling_mm_model janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr
    llama4 llava_next_video minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 molmo2
    muse_glimmer muse_spark ovis2 paddleocr_vl paligemma perception_lm pp_chart2table qianfan_ocr
    qwen2_5_omni_thinker qwen3_5_moe qwen3_omni_moe_thinker qwen4_exp shieldgemma2 smolvlm step3p7 unlimited_ocr
    video_llama_3 vipllava
"""
TESTED = frozenset(_TESTED.split())
"""Model types that `tests/test_any_model.py` tests: with all tokens kept, and pruned against a prompt cut by hand."""

AROUND = ("start", "end", "boi", "eoi", "newline", "indicator", "frame", "image", "video")
"""Parts of names of config entries with token ids around an image."""

PAGE = "see docs/models.md"


def owner_of(model: PreTrainedModel) -> nn.Module:
    """The innermost module with ``get_image_features``; its forward puts image rows into the prompt."""
    owner: nn.Module = model
    while isinstance(inner := getattr(owner, "model", None), nn.Module) and hasattr(inner, "get_image_features"):
        owner = inner
    return owner


def language_model_of(owner: nn.Module) -> nn.Module | None:
    names = ("language_model", "text_model")
    return next((getattr(owner, name) for name in names if isinstance(getattr(owner, name, None), nn.Module)), None)


def refusal(model: PreTrainedModel) -> str | None:
    """The reason why a model cannot be pruned before its language model, or None."""
    config, owner = model.config, owner_of(model)
    language_model = language_model_of(owner)
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose decoder reads the image by cross-attention"
    if not hasattr(owner, "get_image_features") or language_model is None:
        return "no module of it puts image rows into the prompt of a language model"
    if getattr(config, "image_token_id", None) is None:
        return "its config names no placeholder (image_token_id)"
    if "inputs_embeds" not in inspect.signature(language_model.forward).parameters:
        return "its language model takes no inputs_embeds"
    own: Any = type(model)
    if own.generate is not GenerationMixin.generate and config.model_type not in OWN_GENERATE:
        return "its generate is not the one of transformers and may call the language model directly"
    return None


class GenericAdapter(Adapter):
    """Adapter of a model type that has no adapter of its own.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase, optional
    processor : ProcessorMixin, optional
        The model's own processor; only `inputs` uses it.
    options
        See `Adapter`.
    """

    default_positions = "keep"
    reads_inside = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: ProcessorMixin | None = None,
        **options: Any,
    ):
        self.processor = processor
        super().__init__(model, tokenizer, getattr(processor, "image_processor", None), **options)
        if tokenizer is not None:  # none of them may be in a question
            ids = self.around_ids | self.chat.control_ids  # the processor would treat them as control tokens
            self.chat.placeholder_ids = sorted(k for k in ids if k < len(tokenizer))

    def write_placeholders(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        token = getattr(self.processor, "image_token", None)
        return {"image": token} if isinstance(token, str) else super().write_placeholders(tokenizer)

    @property
    def owner(self) -> nn.Module:
        return owner_of(self.model)

    @property
    def language_model(self) -> nn.Module:
        language_model = language_model_of(self.owner)
        assert language_model is not None
        return language_model

    @property
    def around_ids(self) -> set[int]:
        """All ids that the config names for the begin, end or inside of an image."""
        found = set()
        for name, value in self.model.config.to_dict().items():
            if ("token_id" in name or "token_index" in name) and any(part in name for part in AROUND):
                found |= set(value if isinstance(value, list) else [value])
        return {k for k in found if isinstance(k, int)}

    def preprocess(self, image: object) -> NoReturn:
        raise InputError(
            f"a {self.model.config.model_type} has no adapter, so it runs by its own processor and generate only: use "
            f"mipruner.processed.ProcessorPipeline (run.py without task=) or mipruner.prune; {PAGE}"
        )

    run_encoder = preprocess  # type: ignore[assignment]

    def kinds(self, images: Iterable[Media]) -> list[str]:
        kinds = ["video" if isinstance(image, Video) else "image" for image in images]
        if "video" in kinds:
            raise InputError(
                f"a {self.model.config.model_type} has no adapter, and takes images only here: give videos to its own "
                f"processor, inside mipruner.prune; {PAGE}"
            )
        return kinds

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Output of the model's own processor, left-padded. Either all prompts have images or none has.

        Raises
        ------
        InputError
            If the chat template does not show the system message.
        PromptError
            If the processor refuses the prompts.
        """
        texts, chat = [], self.chat
        for prompt in prompts:
            chat.check_text(prompt)
            before, after = chat.render(self.kinds(prompt.images))
            if chat.system and chat.prompt is None and chat.system not in before:
                raise InputError(f"the chat template of this {self.model.config.model_type} shows no system message")
            texts.append(before + prompt.text + after)
        images = [list(prompt.images) for prompt in prompts]
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        assert self.processor is not None
        try:
            batch = self.processor(
                text=texts, images=images if images[0] else None, padding=True, return_tensors="pt", **options
            )
        except Exception as error:
            sizes = ", ".join(f"{width} x {height}" for own in images for width, height in (one.size for one in own))
            what = f"the text with images of {sizes}" if sizes else "the text"
            raise PromptError(f"the processor of {self.model.config.model_type} refuses {what}: {error}") from error
        return dict(batch.to(self.device, self.model.dtype))

    def capture(self, is_video: bool, signals: Set[str]) -> AbstractContextManager[list[Call]]:
        return nullcontext([])

    def read_output(self, output: Any) -> VisionOutput:
        find = ROWS.get(self.model.config.model_type)
        rows = find(self.owner, output) if find else getattr(output, "pooler_output", None)
        if rows is None:
            raise InputError(f"{self.model.config.model_type}: get_image_features returns no pooler_output; {PAGE}")
        return VisionOutput(rows)

    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        grids = inputs.get("video_grid_thw" if is_video else "image_grid_thw")
        return [{"runs": list(runs), "grids": None if grids is None else grids.tolist()}]

    def make_visuals(
        self, output: VisionOutput, calls: list[Call], pixels: Sequence[dict[str, Any]], signals: Set[str]
    ) -> list[Visual]:
        """One `Visual` for each entry of ``pooler_output``.

        If one tensor has the rows of several images, the runs of placeholders separate them. A grid that the call does
        not name is taken to be a square.
        """
        rows, (one,) = output.rows, pixels
        if isinstance(rows, Tensor) and rows.ndim == 3 and rows.shape[1] == 1:  # an entry for each row (Inkling)
            rows = rows[:, 0]
        if isinstance(rows, Tensor) and rows.ndim == 2:
            ends = torch.tensor(one["runs"]).cumsum(0)
            runs = one["runs"][: int((ends <= len(rows)).sum())]
            rows = rows.split(runs) if sum(runs) == len(rows) else [rows]
        rows = [image.flatten(0, -2) for image in rows]
        grids = one["grids"] if one["grids"] is not None and len(one["grids"]) == len(rows) else [None] * len(rows)
        has_newlines = hasattr(self.owner, "image_newline")  # among the rows
        return [
            Visual(rows=image, grid=None if has_newlines and thw is None else grid_of(len(image), thw))
            for image, thw in zip(rows, grids, strict=True)
        ]

    def placed(self, visual: Visual, places: Tensor) -> Visual:
        """Without its grid if the prompt divides the rows into tiles, not into lines."""
        ends = (places.diff() > 1).nonzero()[:, 0] + 1
        is_grid = visual.grid is None or bool((ends.diff(prepend=ends.new_zeros(1)) == visual.grid[-1]).all())
        return visual if is_grid else replace(visual, grid=None)

    def is_placed(self, ids: Tensor, embeds: Tensor, rows: Tensor) -> bool:
        test = PLACED.get(self.model.config.model_type)
        if test is None:
            return super().is_placed(ids, embeds, rows)
        return bool(test(embeds, rows.to(embeds), self.model.get_input_embeddings()(ids)))


def grid_of(n: int, thw: Sequence[int] | None) -> tuple[int, ...] | None:
    """Grid of ``n`` tokens from that of the patches (frames, rows, columns), or a square if n is a square number."""
    if thw is None:
        side = math.isqrt(n)
        return (side, side) if side * side == n else None
    merge = math.isqrt(math.prod(thw) // n)
    if not merge or n * merge * merge != math.prod(thw):
        return None
    t, h, w = thw[0], thw[1] // merge, thw[2] // merge
    return (h, w) if t == 1 else (t, h, w)


def check(model_type: str, pruner: Method) -> None:
    """Refuse methods that need more than image rows and text; warn about untested model types."""
    if missing := sorted(set(pruner.needs) - {"vocabulary", "grid", "words", "question"}):
        raise InputError(
            f"{type(pruner).__name__} reads {', '.join(missing)} of the vision encoder, and of a {model_type!r} only "
            f"image rows and text are known: use mi, similarity, divprune, cdpruner or random; {PAGE}"
        )
    if model_type not in TESTED:
        warnings.warn(
            f"{model_type!r} is not among the model types that were tested: compare answers with keep=1.0; {PAGE}",
            stacklevel=4,
        )
