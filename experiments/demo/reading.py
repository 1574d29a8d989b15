"""Questions that need several patches of a scene at once: both digits of a number, two objects, all objects.

All use words that the demo models know. Some ask for what no demo model was trained to answer: docs/extensions.md has
the accuracy of each form with all tokens.
"""

from collections.abc import Callable, Iterator

import numpy as np

from experiments.demo.questions import COUNTS, EDGES, RELATIONS, Question, choose, closest, comparisons, pick
from experiments.demo.scenes import COLORS, Object, Scene

Form = Callable[[Scene, np.random.Generator], Iterator[Question]]


OPPOSITES = {a: b for a, (x, i) in RELATIONS.items() for b, (y, j) in RELATIONS.items() if x == y and i == -j}


def _check(rng: np.random.Generator, category: str, right: str, wrong: str) -> Question:
    """One of two questions, the first with the answer yes, the second with no."""
    truth = rng.random() < 0.5
    return Question("mme", category, right if truth else wrong, "yes" if truth else "no")


def _related(scene: Scene) -> list[tuple[Object, str, Object]]:
    """All true (a, relation, b)."""
    return [(a, relation, b) for a, relation, b, offset in comparisons(scene) if offset > 0]


def _unique_colors(scene: Scene) -> list[Object]:
    colors = [o.color for o in scene.objects]
    return [o for o in scene.objects if colors.count(o.color) == 1]


def _edges(scene: Scene) -> Iterator[tuple[str, Object]]:
    return ((edge, nearest) for edge in EDGES if (nearest := closest(scene, edge)))


def _number(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if scene.sign:
        yield Question("textvqa", "number", "What number is written on the sign ?", " ".join(scene.sign.digits))


def _number_check(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if scene.sign:
        first, second = list(scene.sign.digits)
        other = str((int(second) + int(rng.integers(1, 10))) % 10)
        yield _check(rng, "number_check", f"Is the number {first} {second} ?", f"Is the number {first} {other} ?")


def _compare(
    rng: np.random.Generator, category: str, related: tuple[Object, str, Object], name: Callable[[Object], str]
) -> Question:
    a, relation, b = related
    right, wrong = (f"Is the {name(a)} {words} the {name(b)} ?" for words in (relation, OPPOSITES[relation]))
    return _check(rng, category, right, wrong)


def _position(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    related = _related(scene)
    for _ in range(4 if related else 0):
        yield _compare(rng, "position", pick(rng, related), lambda o: o.noun)


def _position_by_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    unique = _unique_colors(scene)
    if related := [r for r in _related(scene) if r[0] in unique and r[2] in unique]:
        yield _compare(rng, "position_by_color", pick(rng, related), lambda o: f"{o.color} object")


def _related_choice(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if not (related := _related(scene)):
        return
    _, relation, b = pick(rng, related)
    right = [a.noun for a, words, other in related if other is b and words == relation]
    wrong = [a.noun for a, words, other in related if other is b and words == OPPOSITES[relation]]
    if right and len(wrong) >= 2:
        yield choose(rng, "relation_choice", f"Which object is {relation} the {b.noun} ?", pick(rng, right), wrong)


def _edge(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for edge, nearest in _edges(scene):
        yield Question("gqa", "edge", f"Which object is closest to the {edge} edge ?", nearest.noun)


def _edge_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for edge, nearest in _edges(scene):
        text = f"What color is the object closest to the {edge} edge ?"
        yield Question("gqa", "color_at_edge", text, nearest.color)


def _count(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    true = len(scene.objects)
    wrong = [n for n in (true - 2, true + 2) if 1 <= n <= len(COUNTS)]
    if true <= len(COUNTS) and wrong:
        right, false = COUNTS[true - 1], COUNTS[pick(rng, wrong) - 1]
        yield _check(
            rng, "count", f"Are there {right} objects in the image ?", f"Are there {false} objects in the image ?"
        )


def _count_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    colors = [o.color for o in scene.objects]
    color = pick(rng, colors)
    true = colors.count(color)
    yield _check(
        rng,
        "count_of_color",
        f"Are there {COUNTS[true - 1]} {color} objects in the image ?",
        f"Are there {COUNTS[true + 1]} {color} objects in the image ?",
    )


def _colored(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    thing = pick(rng, scene.objects)
    others = sorted({o.color for o in scene.objects} - {thing.color}) or sorted(set(COLORS) - {thing.color})
    yield _check(
        rng,
        "colored_object",
        f"Is there a {thing.color} {thing.noun} in the image ?",
        f"Is there a {pick(rng, others)} {thing.noun} in the image ?",
    )


def _by_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for thing in _unique_colors(scene)[:2]:
        yield Question("gqa", "object_by_color", f"What is the {thing.color} object ?", thing.noun)


FORMS: dict[str, Form] = {
    "number": _number,
    "number_check": _number_check,
    "position": _position,
    "position_by_color": _position_by_color,
    "relation_choice": _related_choice,
    "edge": _edge,
    "color_at_edge": _edge_color,
    "count": _count,
    "count_of_color": _count_color,
    "colored_object": _colored,
    "object_by_color": _by_color,
}
