"""Scores of single answers and of benchmarks, as pure functions.

``scoring="llava"`` follows the scripts of LLaVA-1.5 (https://github.com/haotian-liu/LLaVA, ``llava/eval`` and
``scripts/v1_5/eval``) exactly, because published pruning results were made with them. ``scoring="lmms_eval"`` is the
rule of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) where it differs. As in LLaVA, answers are stripped of
blanks after generation and not again for scoring. Accuracies of single answers are in [0, 1], those of benchmarks in
percent.
"""

import re
import string
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import numpy as np

SCORINGS = ("llava", "lmms_eval")


def check_scoring(scoring: str) -> str:
    """Return ``scoring`` or raise ValueError naming the valid ones."""
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is not one of {', '.join(SCORINGS)}")
    return scoring


def mean_percent(scores: Sequence[float]) -> float:
    """Mean of scores in [0, 1], in percent; 0 for none."""
    return 100 * fmean(scores) if scores else 0.0


# ---------------------------------------------------------------------------------------------------------------- GQA


def gqa_correct(prediction: str, answer: str, scoring: str = "llava") -> float:
    """1 if the prediction is the answer.

    LLaVA: equality after lower-casing and removing final full stops; "the chair" is not "chair". lmms-eval: equality
    after lower-casing and removing ASCII punctuation from both, so "T-shirt!" equals "tshirt".
    """
    if check_scoring(scoring) == "llava":
        return float(prediction.rstrip(".").lower() == answer)
    delete = str.maketrans("", "", string.punctuation)
    return float(prediction.strip().lower().translate(delete) == answer.lower().translate(delete))


# ---------------------------------------------------------------------------------------------------------- ScienceQA


def scienceqa_letter(prediction: str) -> str | None:
    """Option letter that LLaVA's rule reads in a prediction, or None.

    It reads a single letter A-E, or "B. " at the start, or exactly one "The answer is " + capital letter + one
    character of the same line. So it does not read "B.", "(B)", "b" or a final "The answer is B". LLaVA's random
    fallback is unreachable code.
    """
    if prediction in ("A", "B", "C", "D", "E"):
        return prediction
    if prediction[:1] in ("A", "B", "C", "D", "E") and prediction[1:3] == ". ":
        return prediction[0]
    found = re.findall(r"The answer is ([A-Z]).", prediction)
    return found[0] if len(found) == 1 else None


def scienceqa_correct(prediction: str, answer: str, n_choices: int, scoring: str = "llava") -> float:
    """1 if the prediction names the right option.

    Parameters
    ----------
    answer : str
        Letter of the right option, A-E.
    n_choices : int
        Number of options. LLaVA counts a letter beyond them as wrong.
    """
    if check_scoring(scoring) == "llava":
        letter = scienceqa_letter(prediction)
        return float(letter == answer and letter in "ABCDE"[:n_choices])
    prediction = prediction.strip()
    starts_with_option = len(prediction) >= 2 and prediction[0].isupper() and prediction[1] == "."
    letter = prediction[0] if starts_with_option else prediction
    return float(letter.lower() == answer.lower())


# ------------------------------------------------------------------------------------------------------------ TextVQA

_ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS.split())} | {"none": "0"}

# The evaluator repairs a contraction that lacks one of its apostrophes. The four forms with a capital I are in its
# table but can never match a lower-cased answer; "somebody'd" is in it the wrong way round.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    whole[: mark.start()] + whole[mark.end() :]: whole
    for whole in _CONTRACTED.split()
    for mark in re.finditer("'", whole)
} | {"somebody'd": "somebodyd"}


def textvqa_normalize(text: str) -> str:
    """Normal form of an answer in the M4C / EvalAI evaluator, which LLaVA and lmms-eval use.

    Lower case, no punctuation, digits for number words, no articles, restored apostrophes of contractions. A full stop
    is removed unless a digit follows: from "3.", but not from ".5".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    entered = text
    for mark in ';/[]"{}()=+\\_-><@`!':
        beside_blank = f" {mark}" in entered or f"{mark} " in entered
        text = text.replace(mark, "" if beside_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the evaluator passes a flag, 32, as the count
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of a prediction: 0, 0.3, 0.6, 0.9 or 1 if 0, 1, 2, 3 or more of ten human answers match.

    It is the mean over the ten answers of min(1, matches among the other nine / 3). Raises ValueError unless there are
    ten.
    """
    if len(answers) != 10:
        raise ValueError(f"a TextVQA question has ten answers, not {len(answers)}")
    prediction = textvqa_normalize(prediction)
    agrees = [textvqa_normalize(answer) == prediction for answer in answers]
    return fmean(min(1.0, (sum(agrees) - agree) / 3) for agree in agrees)


# ---------------------------------------------------------------------------------------------------------------- MME

Perception = Literal[
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
]
Cognition = Literal["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
MME_PERCEPTION, MME_COGNITION = get_args(Perception), get_args(Cognition)


def mme_answer(prediction: str, scoring: str = "llava") -> str:
    """ "yes" if the first four characters, in lower case, contain it, else "no" if they contain it, else "other".

    So "not", "know" and "Norway" are no, "yesterday" is yes, "y" is other. lmms-eval first removes blanks and full
    stops, and accepts a single y or n. (The official tool reads tab-separated lines and cannot read answers with a tab
    or a line break; this function can.)
    """
    start = prediction.lower()
    if check_scoring(scoring) == "lmms_eval":
        start = start.strip().replace(".", "")
        start = {"y": "yes", "n": "no"}.get(start, start)
    start = start[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_correct(prediction: str, answer: str, scoring: str = "llava") -> float:
    """1 if the prediction is read as the answer, yes or no."""
    return float(mme_answer(prediction, scoring) == answer.lower())


class MMERow(NamedTuple):
    """An answered MME question. The two questions of an image have the same ``image`` in their category."""

    category: str
    image: str
    answer: str
    prediction: str | None


def mme_scores(rows: Iterable[MMERow], scoring: str = "llava") -> dict[str, float]:
    """MME scores: per category accuracy + accuracy+ (both questions of an image right), each in percent, so 0 to 200.

    ``perception`` is the sum over ten categories (at most 2000), ``cognition`` over four (at most 800). Each exists
    only if all its categories do. An image with only one question among the rows counts in accuracy but not in
    accuracy+. A third question of an image raises ValueError. The prediction None is wrong.

    Returns
    -------
    dict
        perception, cognition, accuracy (mean over all questions), then per category ``<category>``,
        ``<category>_accuracy`` and ``<category>_accuracy_plus``, in the official order.
    """
    right: dict[str, dict[str, list[float]]] = {}
    for category, image, answer, prediction in rows:
        right.setdefault(category, {}).setdefault(image, []).append(
            0.0 if prediction is None else mme_correct(prediction, answer, scoring)
        )
    categories: dict[str, float] = {}
    for category in [*MME_PERCEPTION, *MME_COGNITION, *sorted({*right} - {*MME_PERCEPTION, *MME_COGNITION})]:
        images = right.get(category)
        if images is None:
            continue
        if extra := [image for image, scores in images.items() if len(scores) > 2]:
            raise ValueError(f"MME has two questions an image; {category}/{extra[0]} has {len(images[extra[0]])}")
        accuracy = mean_percent([score for scores in images.values() for score in scores])
        accuracy_plus = mean_percent([min(scores) for scores in images.values() if len(scores) == 2])
        categories[category] = accuracy + accuracy_plus
        categories[f"{category}_accuracy"] = accuracy
        categories[f"{category}_accuracy_plus"] = accuracy_plus
    totals = {
        name: sum(categories[category] for category in group)
        for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))
        if all(category in categories for category in group)
    }
    everything = [score for images in right.values() for scores in images.values() for score in scores]
    return totals | {"accuracy": mean_percent(everything)} | categories


# --------------------------------------------------------------------------------------------------------------- POPE

POPECategory = Literal["random", "popular", "adversarial"]
POPE_CATEGORIES = get_args(POPECategory)


def pope_answer(prediction: str, scoring: str = "llava") -> str:
    """ "yes", "no" or (only for lmms-eval) "other".

    LLaVA: no if a word before the first full stop, without commas, is "No", "no" or "not". Everything else is yes,
    including the empty answer, "NO", "Not" and "cannot". lmms-eval: the stripped, lower-cased answer.
    """
    if check_scoring(scoring) == "llava":
        words = prediction.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"}.intersection(words) else "yes"
    prediction = prediction.lower().strip()
    return prediction if prediction in ("yes", "no") else "other"


def pope_correct(prediction: str, answer: str, scoring: str = "llava") -> float:
    """1 if the prediction is read as the answer, "yes" or "no"."""
    return float(pope_answer(prediction, scoring) == answer.lower().strip())


class POPERow(NamedTuple):
    """An answered POPE question."""

    category: str
    answer: str
    prediction: str | None


def _pope_group(rows: Sequence[POPERow], scoring: str) -> dict[str, float]:
    pairs = [
        (row.answer.lower().strip(), "other" if row.prediction is None else pope_answer(row.prediction, scoring))
        for row in rows
    ]
    true_positive, false_positive = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    false_negative = pairs.count(("yes", "no")) + (pairs.count(("yes", "other")) if scoring == "llava" else 0)
    precision = true_positive / max(1, true_positive + false_positive)
    recall = true_positive / max(1, true_positive + false_negative)
    said_yes = [(gold if scoring == "lmms_eval" else said) == "yes" for gold, said in pairs]
    return {
        "accuracy": mean_percent([gold == said for gold, said in pairs]),
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_rate": fmean(said_yes),
        "precision": precision,
        "recall": recall,
    }


def pope_scores(rows: Sequence[POPERow], scoring: str = "llava") -> dict[str, float]:
    """POPE scores per category, and without a prefix their mean over the existing categories, as in papers.

    Accuracy is in percent. F1, yes-rate, precision and recall (positive: yes) are in [0, 1], and 0 if undefined. LLaVA:
    yes-rate is the share of answers read as yes. lmms-eval: precision and recall ignore answers that are neither yes
    nor no, the yes-rate is that of the *reference*, and ``pooled_f1`` is the F1 over all questions, as in its `pope`
    task. The prediction None is wrong, and neither yes nor no.
    """
    check_scoring(scoring)
    present = {row.category: None for row in rows}
    order = [c for c in POPE_CATEGORIES if c in present] + [c for c in present if c not in POPE_CATEGORIES]
    groups = {category: _pope_group([row for row in rows if row.category == category], scoring) for category in order}
    names = ("accuracy", "f1", "yes_rate", "precision", "recall") if groups else ()
    scores = {name: fmean(group[name] for group in groups.values()) for name in names}
    if groups and scoring == "lmms_eval":
        scores["pooled_f1"] = _pope_group(rows, scoring)["f1"]
    return scores | {f"{category}_{name}": value for category, group in groups.items() for name, value in group.items()}


# --------------------------------------------------------------------------------------------------------- uncertainty


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean of independent scores, in the unit of the scores. Raises ValueError for fewer than
    two.
    """
    if len(scores) < 2:
        raise ValueError("a standard error needs two scores or more")
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores)))


class Bootstrap(NamedTuple):
    """Spread of a mean over resamples of the items: standard deviation and 95 % percentile interval."""

    sd: float
    low: float
    high: float


def bootstrap(
    scores: Sequence[float], n_resamples: int = 10_000, seed: int = 0, n_items: int | None = None
) -> Bootstrap:
    """Spread of the mean, in the unit of ``scores``, over resamples of the items with replacement.

    ``n_items`` is the size of a resample; by default all. The paper's +-7.6 on MM-Vet is about the spread for 33 items;
    for all 218 questions it is about 2.9. Raises ValueError for fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError("a bootstrap needs two scores or more")
    from scipy import stats  # takes 0.3 seconds to import

    n_items = len(scores) if n_items is None else min(n_items, len(scores))

    def mean(items: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.take(items, range(n_items), axis).mean(axis)

    result = stats.bootstrap(
        (np.asarray(scores, dtype=float),),
        mean,
        n_resamples=n_resamples,
        batch=max(1, 4_000_000 // len(scores)),
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Bootstrap(float(result.standard_error), float(low), float(high))
