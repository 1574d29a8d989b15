"""Questions that need several patches of a scene at once: both digits of a number, two objects, all objects.

All use words that the demo models know. Some ask for what no demo model was trained to answer: docs/extensions.md has
the accuracy of each form with all tokens.
"""

from collections.abc import Callable, Iterator

import numpy as np

from experiments.demo.questions import COUNTS, EDGES, MIN_EDGE_LEAD, MIN_OFFSET, RELATIONS, Question
from experiments.demo.scenes import COLORS, Object, Scene

Form = Callable[[Scene, np.random.Generator], Iterator[Question]]


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _yes_or_no(rng: np.random.Generator, category: str, right: str, wrong: str) -> Question:
    """One of two statements, each asked half of the time."""
    truth = rng.random() < 0.5
    return Question("mme", category, right if truth else wrong, "yes" if truth else "no")


def _related(scene: Scene) -> list[tuple[Object, str, str, Object]]:
    """All true (a, relation, opposite relation, b) whose centres are far enough apart."""
    opposite = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
    return [
        (a, relation, opposite[relation], b)
        for a in scene.objects
        for b in scene.objects
        for relation, (axis, sign) in RELATIONS.items()
        if sign * (a.center[axis] - b.center[axis]) >= MIN_OFFSET
    ]


def _unique_colors(scene: Scene) -> list[Object]:
    colors = [o.color for o in scene.objects]
    return [o for o in scene.objects if colors.count(o.color) == 1]


def _edges(scene: Scene) -> Iterator[tuple[str, Object]]:
    """The object closest to each edge, where it leads clearly."""
    for edge, distance in EDGES.items():
        nearest, second = sorted(scene.objects, key=lambda o: distance(o, scene))[:2]
        if distance(second, scene) - distance(nearest, scene) >= MIN_EDGE_LEAD:
            yield edge, nearest


def _number(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if scene.sign:
        yield Question("textvqa", "number", "What number is written on the sign ?", " ".join(scene.sign.digits))


def _number_check(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if scene.sign:
        first, second = list(scene.sign.digits)
        other = str((int(second) + int(rng.integers(1, 10))) % 10)
        yield _yes_or_no(rng, "number_check", f"Is the number {first} {second} ?", f"Is the number {first} {other} ?")


def _position(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    related = _related(scene)
    for _ in range(4 if related else 0):
        a, true, false, b = _pick(rng, related)
        yield _yes_or_no(
            rng, "position", f"Is the {a.noun} {true} the {b.noun} ?", f"Is the {a.noun} {false} the {b.noun} ?"
        )


def _position_by_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    unique = _unique_colors(scene)
    related = [r for r in _related(scene) if r[0] in unique and r[3] in unique]
    if related:
        a, true, false, b = _pick(rng, related)
        yield _yes_or_no(
            rng,
            "position_by_color",
            f"Is the {a.color} object {true} the {b.color} object ?",
            f"Is the {a.color} object {false} the {b.color} object ?",
        )


def _related_choice(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    related = _related(scene)
    if not related:
        return
    _, relation, _, b = _pick(rng, related)
    axis, sign = RELATIONS[relation]
    offsets = {o.noun: sign * (o.center[axis] - b.center[axis]) for o in scene.objects if o is not b}
    right = [n for n, d in offsets.items() if d >= MIN_OFFSET]
    wrong = [n for n, d in offsets.items() if d <= -MIN_OFFSET]
    if right and len(wrong) >= 2:
        options = [_pick(rng, right), *rng.choice(wrong, 2, replace=False)]
        mixed = [options[i] for i in rng.permutation(3)]
        listed = " ".join(f"{letter} . {option}" for letter, option in zip("ABC", mixed, strict=True))
        answer = "ABC"[mixed.index(options[0])]
        yield Question("scienceqa", "relation_choice", f"Which object is {relation} the {b.noun} ? {listed}", answer)


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
        right, false = COUNTS[true - 1], COUNTS[_pick(rng, wrong) - 1]
        yield _yes_or_no(
            rng, "count", f"Are there {right} objects in the image ?", f"Are there {false} objects in the image ?"
        )


def _count_color(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    colors = [o.color for o in scene.objects]
    color = _pick(rng, colors)
    true = colors.count(color)
    yield _yes_or_no(
        rng,
        "count_of_color",
        f"Are there {COUNTS[true - 1]} {color} objects in the image ?",
        f"Are there {COUNTS[true + 1]} {color} objects in the image ?",
    )


def _colored(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    thing = _pick(rng, scene.objects)
    others = sorted({o.color for o in scene.objects} - {thing.color}) or sorted(set(COLORS) - {thing.color})
    yield _yes_or_no(
        rng,
        "colored_object",
        f"Is there a {thing.color} {thing.noun} in the image ?",
        f"Is there a {_pick(rng, others)} {thing.noun} in the image ?",
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
