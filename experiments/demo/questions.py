"""Questions of the demo about a scene, in the wording of five benchmarks, with answers from the list of objects."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.demo.scenes import COLORS, NOUNS, THEMES, Object, Scene

TASKS = ("pope", "gqa", "scienceqa", "textvqa", "mme")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
GQA_FORMS = {"color": 0.5, "object": 0.3, "edge": 0.2}  # probability of each form
MIN_EDGE_LEAD = 40  # smallest lead in px of the object closest to an edge
WRONG_COUNT_OFFSET = 2  # error of a wrong count; one at the ends of COUNTS
MIN_OFFSET = 30  # smallest distance in px between the centres of compared objects
EDGES: dict[str, Callable[[Object, Scene], int]] = {
    "left": lambda o, scene: o.box[0],
    "right": lambda o, scene: scene.size[0] - o.box[2],
    "top": lambda o, scene: o.box[1],
    "bottom": lambda o, scene: scene.size[1] - o.box[3],
}
RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign


@dataclass(frozen=True)
class Mix:
    """Numbers of questions for one scene. Counting questions need few objects, as in training."""

    n_gqa: int
    n_scienceqa: int
    counting: bool


MIXES = {"sparse": Mix(2, 1, True), "crowded": Mix(4, 2, False)}


@dataclass(frozen=True)
class Question:
    """One question. ``category`` is POPE's split or MME's category, else empty."""

    task: str
    category: str
    text: str
    answer: str


def make_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of one scene, by task in the order of TASKS. Their number depends on the density (`MIXES`)."""
    mix = MIXES[scene.density]
    return [
        *_pope(scene, rng),
        *_gqa(scene, rng, mix.n_gqa),
        *(_scienceqa(scene, rng) for _ in range(mix.n_scienceqa)),
        *_textvqa(scene),
        *_mme(scene, rng, mix.counting),
    ]


def pick(rng: np.random.Generator, items):
    """One of the items, all equally probable."""
    return items[int(rng.integers(len(items)))]


def _absent(scene: Scene, among=NOUNS) -> list[str]:
    """Nouns of ``among`` that are not in the scene; of all nouns if ``among`` has none."""
    return [noun for noun in among if noun not in scene.nouns] or _absent(scene)


def closest(scene: Scene, edge: str) -> Object | None:
    """The object closest to an edge; None if it does not lead clearly."""
    distance = EDGES[edge]
    nearest, second = sorted(scene.objects, key=lambda o: (distance(o, scene), o.noun))[:2]
    return nearest if distance(second, scene) - distance(nearest, scene) >= MIN_EDGE_LEAD else None


def comparisons(scene: Scene) -> list[tuple[Object, str, Object, float]]:
    """All (a, relation, b, offset in px) of objects far enough apart. The relation holds if the offset is positive."""
    return [
        (a, relation, b, sign * (a.center[axis] - b.center[axis]))
        for a in scene.objects
        for b in scene.objects
        for relation, (axis, sign) in RELATIONS.items()
        if abs(a.center[axis] - b.center[axis]) >= MIN_OFFSET
    ]


def _presence(noun: str) -> str:
    return f"Is there {'an' if noun[0] in 'aeiou' else 'a'} {noun} in the image ?"


def _yes_or_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _pope(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """A present and an absent noun for each split. The splits differ in the source of the absent noun."""
    commonest, next_commonest, *_ = THEMES.values()
    splits = {"random": NOUNS, "popular": (*commonest, *next_commonest), "adversarial": tuple(THEMES[scene.theme])}
    for split, nouns in splits.items():
        yield Question("pope", split, _presence(pick(rng, scene.nouns)), "yes")
        yield Question("pope", split, _presence(pick(rng, _absent(scene, nouns))), "no")


def _gqa(scene: Scene, rng: np.random.Generator, n: int) -> list[Question]:
    """``n`` different questions, at most one per object."""
    asked: dict[str, str] = {}
    while len(asked) < min(n, len(scene.objects)):
        text, answer = _gqa_question(scene, rng)
        asked[text] = answer
    return [Question("gqa", "", text, answer) for text, answer in asked.items()]


def _gqa_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question of one of three forms; about the colour of an object if the drawn form has no clear answer."""
    thing = pick(rng, scene.objects)
    form = rng.choice(list(GQA_FORMS), p=list(GQA_FORMS.values()))
    if form == "object" and [o.color for o in scene.objects].count(thing.color) == 1:
        return f"What is the {thing.color} object ?", thing.noun
    if form == "edge":
        edge = pick(rng, tuple(EDGES))
        if nearest := closest(scene, edge):
            return f"Which object is closest to the {edge} edge ?", nearest.noun
    return f"What color is the {thing.noun} ?", thing.color


def _scienceqa(scene: Scene, rng: np.random.Generator) -> Question:
    thing = pick(rng, scene.objects)
    if rng.random() < 0.5:
        stem, right, wrong = "Which object is in the image ?", thing.noun, _absent(scene)
    else:
        stem, right, wrong = f"Which color is the {thing.noun} ?", thing.color, [c for c in COLORS if c != thing.color]
    return choose(rng, "", stem, right, wrong)


def choose(rng: np.random.Generator, category: str, stem: str, right: str, wrong: Sequence[str]) -> Question:
    """The right option and two wrong ones in random order."""
    options = [right, *rng.choice(wrong, 2, replace=False)]
    options = [options[i] for i in rng.permutation(3)]
    text = " ".join([stem, *(f"{letter} . {option}" for letter, option in zip("ABC", options, strict=True))])
    return Question("scienceqa", category, text, "ABC"[options.index(right)])


def _textvqa(scene: Scene) -> Iterator[Question]:
    if scene.sign:
        yield Question("textvqa", "", "What number is written on the sign ?", " ".join(scene.sign.digits))


def _mme(scene: Scene, rng: np.random.Generator, counting: bool) -> Iterator[Question]:
    present = rng.random() < 0.5
    yield Question(
        "mme",
        "existence",
        _presence(pick(rng, scene.nouns if present else _absent(scene))),
        _yes_or_no(present),
    )

    if counting:
        true = len(scene.objects)
        wrong = {max(true - WRONG_COUNT_OFFSET, 1), min(true + WRONG_COUNT_OFFSET, len(COUNTS))} - {true}
        count = true if rng.random() < 0.5 else pick(rng, sorted(wrong))
        yield Question(
            "mme", "count", f"Are there {COUNTS[count - 1]} objects in the image ?", _yes_or_no(count == true)
        )

    if compared := comparisons(scene):
        a, relation, b, offset = pick(rng, compared)
        yield Question("mme", "position", f"Is the {a.noun} {relation} the {b.noun} ?", _yes_or_no(offset > 0))

    thing = pick(rng, scene.objects)
    right = rng.random() < 0.5
    color = thing.color if right else pick(rng, [c for c in COLORS if c != thing.color])
    yield Question("mme", "color", f"Is the {thing.noun} {color} ?", _yes_or_no(right))
