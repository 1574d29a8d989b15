"""Training examples: rendered scenes, some of their questions as turns of one sequence, and labels of patches.

Example i depends only on the seed and on i, so a resumed run gets the same examples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from experiments.demo.questions import Question, make_questions
from experiments.demo.scenes import (
    COLORS,
    DIGIT_CENTERS,
    NOUNS,
    Scene,
    glyph_mask,
    make_scene,
    render,
    scene_generators,
)

IGNORE = -100
MIN_INK = 0.05  # share of a patch that an object must cover for the patch to show it
MIN_SIGN = 0.5  # share of a patch that the sign must cover
MIN_DIGIT = 0.1  # the same of the box around a digit
DIGIT_HALF_SIZE = (8, 11)  # px from a digit's centre to the sides of its box
THINGS = (*NOUNS, *map(str, range(10)), "sign")


class Examples(Dataset):
    """Scenes drawn for one stage of training.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    seed : int
    cell : int
        Side in px of the square of one visual token.
    canvases : sequence of (width, height)
        Image sizes in px, used in turn by batches, so the images of a batch have one size.
    batch : int
        Examples in a batch.
    crowded : float
        Share of crowded scenes; the others are sparse.
    n_questions : int
        Number of turns in a sequence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        cell: int,
        canvases: Sequence[tuple[int, int]],
        batch: int,
        crowded: float,
        n_questions: int,
    ):
        self.tokenizer, self.seed, self.cell = tokenizer, seed, cell
        self.canvases, self.batch, self.crowded, self.n_questions = canvases, batch, crowded, n_questions
        self.words = tokenizer.get_vocab()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Pixels [3, height, width] uint8; ids, labels [n_ids]; things, colors [n_visual]; presence [n_words]."""
        scene_rng, question_rng = scene_generators(self.seed, index)
        density = "crowded" if scene_rng.random() < self.crowded else "sparse"
        scene = make_scene(scene_rng, density, self.canvases[index // self.batch % len(self.canvases)])
        ids, labels = self.turns(choose_questions(scene, question_rng, self.n_questions))
        things, colors = (self.word_ids(grid) for grid in cell_words(scene, self.cell))
        present = {*scene.nouns, *(o.color for o in scene.objects)}
        return {
            "pixels": torch.from_numpy(np.array(render(scene))).permute(2, 0, 1).contiguous(),
            "ids": ids,
            "labels": labels,
            "things": things,
            "colors": colors,
            "presence": torch.tensor([float(word in present) for word in (*NOUNS, *COLORS)]),
        }

    def turns(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Token ids of the turns, and labels in which only the answers are not ignored."""
        ids, labels = [], []
        for question in questions:
            asked = self.tokenizer(f"USER: {question.text} ASSISTANT:", add_special_tokens=False).input_ids
            answered = self.tokenizer(f"{question.answer} </s>", add_special_tokens=False).input_ids
            ids += asked + answered
            labels += [IGNORE] * len(asked) + answered
        return torch.tensor(ids), torch.tensor(labels)

    def word_ids(self, words: np.ndarray) -> Tensor:
        return torch.tensor([self.words.get(word, IGNORE) for word in words.ravel()])

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        padding = {"ids": self.tokenizer.pad_token_id, "labels": IGNORE}
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        return {
            name: pad_sequence(rows, batch_first=True, padding_value=padding[name])
            if name in padding
            else torch.stack(rows)
            for name, rows in columns.items()
        }


def choose_questions(scene: Scene, rng: np.random.Generator, n: int) -> list[Question]:
    """Choose ``n`` different questions, about equally many of each task and category, in random order."""
    kinds: dict[tuple[str, str], list[Question]] = {}
    for question in dict.fromkeys(make_questions(scene, rng) + make_questions(scene, rng)):
        kinds.setdefault((question.task, question.category), []).append(question)
    rounds = []
    for questions in kinds.values():
        order = rng.permutation(len(questions))
        rounds += [(turn, rng.random(), questions[i]) for turn, i in enumerate(order)]
    chosen = [question for *_, question in sorted(rounds, key=lambda entry: entry[:2])[:n]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def cell_words(scene: Scene, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Words for each cell of an image: a noun, a digit or ``sign``, and the colour of the object; "" for none.

    Two arrays [height / cell, width / cell] of words. If a cell has two objects, the one with more ink counts.
    """
    width, height = scene.size
    shape = (height // cell, width // cell)
    things, colors = np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    most = np.full(shape, MIN_INK)

    def paint(word: str, color: str, ink: np.ndarray, left: int, top: int, least: float = MIN_INK) -> None:
        canvas = np.zeros((height, width))
        canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        share = canvas.reshape(shape[0], cell, shape[1], cell).mean((1, 3))
        shown = (share >= least) & (share >= most)
        things[shown], colors[shown], most[shown] = word, color, share[shown]

    for o in scene.objects:
        left, top, right, bottom = o.box
        paint(o.noun, o.color, np.asarray(glyph_mask(o.noun, max(right - left, bottom - top))) / 255, left, top)
    if scene.sign:
        left, top, right, bottom = scene.sign.box
        paint("sign", "", np.ones((bottom - top, right - left)), left, top, MIN_SIGN)
        most[things == "sign"] = 0  # digits stand on the sign
        half_width, half_height = DIGIT_HALF_SIZE
        for digit, (x, y) in zip(scene.sign.digits, DIGIT_CENTERS, strict=True):
            paint(
                digit,
                "",
                np.ones((2 * half_height, 2 * half_width)),
                left + x - half_width,
                top + y - half_height,
                MIN_DIGIT,
            )
    return things, colors
