"""Section 3: compares token ids of fixed questions, numbers of visual tokens, and T with stored values.

`prompts.json` has, for each family with a known rule, the ids before and after the image, from the rule of the original
code and the published tokenizer. For other models the ids are compared with those of the model's own processor or chat
template.
"""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoProcessor

from experiments.accept.report import Line, check, not_run
from mipruner.models import Adapter, Prompt
from mipruner.prompt import Visual

STORED = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
QUESTIONS: list[str] = STORED["questions"]
SIZES: list[tuple[int, int]] = [tuple(size) for size in STORED["sizes"]]


def family_of(model: str) -> dict[str, Any] | None:
    """Stored values of a model, by its name on the command line."""
    return next((family for family in STORED["families"] if model in family["models"]), None)


def check_prompts(adapter: Adapter, model: str, folder: Path) -> Iterator[Line]:
    """Lines of section 3 for a loaded model, by its name on the command line."""
    family = family_of(model)
    plain = copy(adapter)
    plain.chat = copy(adapter.chat)
    plain.chat.system = None
    if family is None:
        plain.chat.prompt = None
    image = Image.new("RGB", (336, 336), (90, 120, 150))
    visuals = adapter.encode([adapter.preprocess(image)])
    questions, source = QUESTIONS, "the rule of this model's family"
    if family is not None:
        questions, source = family.get("questions", QUESTIONS), family["source"]
        wanted = [stored_ids(family, k, len(visuals[0].rows)) for k in range(len(questions))]
    else:
        wanted, source = own_ids(plain, folder, image, questions, visuals)
    wrong, unread = [], []
    for question, ids in zip(questions, wanted, strict=True):
        tokens = plain.tokenize(Prompt(question, [image]), visuals)
        if tokens.ids.tolist() != ids:
            wrong.append(f"{question!r}: {difference(tokens.ids.tolist(), ids)}")
        said = str(adapter.tokenizer.decode(tokens.ids[tokens.is_text]))
        if "".join(said.split()) != "".join(question.split()):
            unread.append(f"{said!r} for {question!r}")
    n = len(questions)
    yield check("prompt ids", not wrong, f"equal for {n} questions", wrong[0] if wrong else f"{n} equal", source=source)
    yield check("T, decoded", not unread, f"the user's text, {n} times", unread[0] if unread else f"{n} equal")
    name = f"visual tokens of images of {', '.join(f'{w} x {h}' for w, h in SIZES)}"
    if family is None:
        yield not_run(name, "no numbers of this model are stored")
        return
    found = [len(adapter.encode([adapter.preprocess(Image.new("RGB", size))])[0].rows) for size in SIZES]
    yield check(
        name, found == family["visual_tokens"], family["visual_tokens"], found, "", family["visual_tokens_source"]
    )


def stored_ids(family: dict[str, Any], question: int, n_rows: int) -> list[int]:
    return [*family["before"], *[family["image_token_id"]] * n_rows, *family["after"][question]]


def own_ids(
    adapter: Adapter, folder: Path, image: Image.Image, questions: Sequence[str], visuals: Sequence[Visual]
) -> tuple[list[list[int]], str]:
    """Ids of the model's own processor, and their source; of its chat template if the processor cannot load."""
    chats: list[Any] = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        texts = [adapter.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        ids = [expanded(adapter, str(text), visuals) for text in texts]
        return ids, f"the model's chat template; its processor does not load here ({reason})"
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    ids = [processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist() for text in texts]
    return ids, "the model's own processor; no ids of this model are stored"


def expanded(adapter: Adapter, text: str, visuals: Sequence[Visual]) -> list[int]:
    """Ids of a rendered prompt of one image, with the placeholder repeated for each row."""
    layout, runs = adapter.lay_out(visuals[0])
    text = text.replace(adapter.chat.placeholders["image"], layout, 1)
    bos = adapter.tokenizer.bos_token
    ids = adapter.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
    counts, places = iter(runs), set(adapter.placeholder_ids.values())
    return [token for one in ids for token in [one] * (next(counts) if one in places else 1)]


def difference(found: Sequence[int], wanted: Sequence[int]) -> str:
    place = next((k for k, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"{len(found)} ids instead of {len(wanted)}"
    return f"id {found[place]} at place {place} instead of {wanted[place]}"
