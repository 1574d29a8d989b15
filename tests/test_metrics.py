"""Hand-scored answers, the odd ones that users report included."""

import random
from statistics import fmean, stdev

import pytest

from experiments.metrics import (
    MME_COGNITION,
    MME_PERCEPTION,
    MMERow,
    POPERow,
    bootstrap,
    gqa_correct,
    mme_answer,
    mme_correct,
    mme_scores,
    pope_answer,
    pope_correct,
    pope_scores,
    scienceqa_correct,
    standard_error,
    textvqa_accuracy,
    textvqa_normalize,
)

# prediction, answer, LLaVA, lmms-eval
GQA = [
    ("chair", "chair", 1, 1),
    ("Chair.", "chair", 1, 1),
    ("CHAIR...", "chair", 1, 1),
    ("the chair", "chair", 0, 0),
    ("chair!", "chair", 0, 1),
    ('"chair"', "chair", 0, 1),
    ("chair ", "chair", 0, 1),
    ("chair. ", "chair", 0, 1),
    ("chair .", "chair", 0, 0),  # the blank stays inside for both
    ("T-shirt", "t-shirt", 1, 1),
    ("tshirt", "t-shirt", 0, 1),
    ("tee-shirt", "t-shirt", 0, 0),
    ("t shirt", "t-shirt", 0, 0),
    ("no, it is not", "no", 0, 0),
    ("yes", "no", 0, 0),
    ("", "no", 0, 0),
    (".", "no", 0, 0),
]


@pytest.mark.parametrize(("prediction", "answer", "llava", "lmms_eval"), GQA)
def test_gqa(prediction, answer, llava, lmms_eval):
    assert gqa_correct(prediction, answer) == llava
    assert gqa_correct(prediction, answer, "lmms_eval") == lmms_eval


# prediction, answer, choices, LLaVA, lmms-eval
SCIENCEQA = [
    ("B", "B", 4, 1, 1),
    ("b", "B", 4, 0, 1),
    ("B.", "B", 4, 0, 1),
    ("B. liquid", "B", 4, 1, 1),
    ("B.liquid", "B", 4, 0, 1),
    ("b. liquid", "B", 4, 0, 0),
    ("B) liquid", "B", 4, 0, 0),
    ("(B)", "B", 4, 0, 0),
    (" B", "B", 4, 0, 1),
    ("The answer is B.", "B", 4, 1, 0),
    ("The answer is B", "B", 4, 0, 0),  # LLaVA's pattern wants one more character
    ("The answer is B\nbecause", "B", 4, 0, 0),  # and not a line break
    ("The answer is BC", "B", 4, 1, 0),
    ("So. The answer is B, I think", "B", 4, 1, 0),
    ("The answer is A. The answer is B.", "B", 4, 0, 0),
    ("The answer is B. The answer is B.", "B", 4, 0, 0),
    ("the answer is B.", "B", 4, 0, 0),
    ("C", "C", 2, 0, 1),  # a letter beyond the choices
    ("C. gas", "C", 2, 0, 1),
    ("F", "F", 5, 0, 1),
    ("The answer is F.", "A", 4, 0, 0),
    ("liquid", "B", 4, 0, 0),
    ("", "A", 4, 0, 0),
    ("A. ", "A", 2, 1, 1),
    ("E", "E", 5, 1, 1),
]


@pytest.mark.parametrize(("prediction", "answer", "n_choices", "llava", "lmms_eval"), SCIENCEQA)
def test_scienceqa(prediction, answer, n_choices, llava, lmms_eval):
    assert scienceqa_correct(prediction, answer, n_choices) == llava
    assert scienceqa_correct(prediction, answer, n_choices, "lmms_eval") == lmms_eval


def test_scienceqa_never_guesses():
    assert {scienceqa_correct("no idea", letter, 5) for letter in "ABCDE" for _ in range(50)} == {0.0}


NORMALIZED = [
    ("The Stop Sign", "stop sign"),
    ("1,000", "1000"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("3.", "3"),
    ("Dr. Pepper.", "dr pepper"),
    ("a.b", "ab"),
    ("v1.2.x", "v1.2x"),
    ("." * 40, "." * 8),  # 32 at most are deleted
    ("ten past three", "10 past 3"),
    ("None", "0"),
    ("a an the", ""),
    ("a-b", "b"),  # the dash becomes a blank, then the article goes
    ("stop-sign", "stop sign"),
    ("stop - sign", "stop sign"),
    ("stop- sign-post", "stop signpost"),  # one dash beside a blank deletes them all
    ("what?!", "what"),
    ("what? ! no", "what no"),
    ("10:10", "10:10"),
    ("$5 & 20%", "$5 & 20%"),
    ("#1", "#1"),
    ("café’s", "café’s"),
    ("dont", "don't"),
    ("dont't", "dont't"),
    ("couldntve", "couldntve"),  # two missing apostrophes are not in the table
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("yall'd've", "y'all'd've"),
    ("Im", "im"),  # the table's key has a capital and never matches
    ("Ive", "ive"),
    ("somebody'd", "somebodyd"),
    ("she's", "she 's"),  # a blank goes in before every 's
    ("mcdonald's", "mcdonald 's"),
    ("shes", "shes"),
    ("whats", "what's"),
    ("one\ntwo\tthree", "1 2 3"),
    ("  7 up ", "7 up"),
    ("a/c", "c"),
    ("x_y", "x y"),
    ("(new)york", "new york"),
    ("(new) york", "new york"),
    ("<b>bold</b>", "b bold b"),
]


@pytest.mark.parametrize(("text", "normal"), NORMALIZED)
def test_textvqa_normalize(text, normal):
    assert textvqa_normalize(text) == normal


def test_textvqa_accuracy_counts_agreement():
    for agreeing, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        answers = ["acme"] * agreeing + [f"other {i}x" for i in range(10 - agreeing)]
        assert textvqa_accuracy("ACME.", answers) == pytest.approx(expected)


def test_textvqa_accuracy_matches_leave_one_out():
    rng = random.Random(0)
    words = ["stop", "Stop.", "the stop", "halt", "10", "ten"]
    for _ in range(200):
        answers, prediction = rng.choices(words, k=10), rng.choice(words)
        expected = []
        for i in range(10):
            others = [a for j, a in enumerate(answers) if j != i]
            same = [a for a in others if textvqa_normalize(a) == textvqa_normalize(prediction)]
            expected.append(min(1, len(same) / 3))
        assert textvqa_accuracy(prediction, answers) == pytest.approx(fmean(expected))


def test_textvqa_wants_ten_answers():
    with pytest.raises(ValueError, match="ten answers, not 9"):
        textvqa_accuracy("x", ["x"] * 9)


# prediction, LLaVA, lmms-eval
MME = [
    ("Yes", "yes", "yes"),
    ("yes.", "yes", "yes"),
    ("YES, it is", "yes", "yes"),
    ("No", "no", "no"),
    ("no\nbecause", "no", "no"),
    ("not at all", "no", "no"),
    ("None", "no", "no"),
    ("know", "no", "no"),
    ("nope", "no", "no"),
    ("Norway", "no", "no"),
    ("yesterday", "yes", "yes"),
    ("It is", "other", "other"),
    ("The answer is yes", "other", "other"),
    ("y", "other", "yes"),
    ("N", "other", "no"),
    ("n.", "other", "no"),
    ("n.o.", "other", "no"),
    ("...no", "other", "no"),
    (" no", "no", "no"),
    ("   no", "other", "no"),
    ("", "other", "other"),
]


@pytest.mark.parametrize(("prediction", "llava", "lmms_eval"), MME)
def test_mme_answer(prediction, llava, lmms_eval):
    assert mme_answer(prediction) == llava
    assert mme_answer(prediction, "lmms_eval") == lmms_eval
    assert mme_correct(prediction, "Yes") == (llava == "yes")


def test_mme_scores_by_hand():
    rows = []
    for category in MME_PERCEPTION:
        rows += [MMERow(category, "1.png", "Yes", "Yes"), MMERow(category, "1.png", "No", "No")]
        rows += [MMERow(category, "2.png", "Yes", "yes"), MMERow(category, "2.png", "No", "yes")]
    scores = mme_scores(rows)
    assert scores["existence_accuracy"] == 75
    assert scores["existence_accuracy_plus"] == 50
    assert scores["existence"] == 125
    assert scores["perception"] == 1250
    assert scores["accuracy"] == 75
    assert "cognition" not in scores
    assert next(iter(scores)) == "perception"
    random.Random(0).shuffle(rows)  # pairs are found by image, not by position
    assert mme_scores(rows) == scores
    assert "perception" not in mme_scores([row for row in rows if row.category != "OCR"])


def test_mme_perfect_and_hopeless():
    pairs = [("Yes", "Yes"), ("No", "No")]
    rows = [MMERow(c, "1", gold, said) for c in (*MME_PERCEPTION, *MME_COGNITION) for gold, said in pairs]
    assert mme_scores(rows)["perception"] == 2000
    assert mme_scores(rows)["cognition"] == 800
    assert mme_scores([row._replace(prediction="") for row in rows])["perception"] == 0


def test_mme_broken_pairs():
    """An image with one question left (a limited run) has no accuracy+; three questions are a fault of the data."""
    rows = [
        MMERow("count", "1", "Yes", "Yes"),
        MMERow("count", "1", "No", "No"),
        MMERow("count", "2", "Yes", "No"),
    ]
    scores = mme_scores(rows)
    assert scores["count_accuracy"] == pytest.approx(200 / 3)
    assert scores["count_accuracy_plus"] == 100
    assert mme_scores(rows[:1])["count"] == 100
    assert mme_scores([]) == {"accuracy": 0.0}
    with pytest.raises(ValueError, match="count/1 has 3"):
        mme_scores([*rows, MMERow("count", "1", "No", "No")])


# prediction, LLaVA, lmms-eval
POPE = [
    ("Yes", "yes", "yes"),
    ("Yes.", "yes", "other"),
    ("No", "no", "no"),
    ("no", "no", "no"),
    ("No.", "no", "other"),
    ("No, there is not.", "no", "other"),
    ("NO", "yes", "no"),
    ("No!", "yes", "other"),
    ("no\nbecause", "yes", "other"),
    ("Not", "yes", "other"),
    ("There is not a dog", "no", "other"),
    ("There isn't a dog", "yes", "other"),
    ("I cannot see it", "yes", "other"),
    ("There is a dog. No.", "yes", "other"),  # only what stands before the first full stop
    ("nothing", "yes", "other"),
    ("", "yes", "other"),
    (" no ", "no", "no"),
]


@pytest.mark.parametrize(("prediction", "llava", "lmms_eval"), POPE)
def test_pope_answer(prediction, llava, lmms_eval):
    assert pope_answer(prediction) == llava
    assert pope_answer(prediction, "lmms_eval") == lmms_eval
    assert pope_correct(prediction, "no") == (llava == "no")


def pope_rows(category, tp, fp, tn, fn, unread=0):
    counts = [("yes", "Yes", tp), ("no", "Yes", fp), ("no", "No", tn), ("yes", "No", fn), ("yes", "Yes.", unread)]
    return [POPERow(category, gold, said) for gold, said, count in counts for _ in range(count)]


def test_pope_scores_by_hand():
    rows = pope_rows("adversarial", 6, 4, 6, 4) + pope_rows("random", 9, 1, 9, 1) + pope_rows("popular", 8, 2, 8, 2)
    scores = pope_scores(rows)
    assert next(iter(scores)) == "accuracy"
    assert scores["random_accuracy"] == pytest.approx(90)
    assert scores["adversarial_f1"] == pytest.approx(0.6)
    assert scores["accuracy"] == pytest.approx((60 + 90 + 80) / 3)
    assert scores["f1"] == pytest.approx((0.6 + 0.9 + 0.8) / 3)
    assert scores["yes_rate"] == pytest.approx(0.5)
    assert [name for name in scores if name.endswith("_yes_rate")] == [
        "random_yes_rate",
        "popular_yes_rate",
        "adversarial_yes_rate",
    ]


def test_pope_yes_rate_is_of_the_answers_in_llava_and_of_the_reference_in_lmms_eval():
    rows = pope_rows("random", 1, 0, 4, 3)
    assert pope_scores(rows)["yes_rate"] == 1 / 8
    assert pope_scores(rows, "lmms_eval")["yes_rate"] == 4 / 8


def test_pope_unread_answers():
    rows = pope_rows("random", 2, 1, 3, 1, unread=3)
    assert pope_scores(rows)["accuracy"] == 80
    lmms_eval = pope_scores(rows, "lmms_eval")
    assert lmms_eval["accuracy"] == 50
    assert lmms_eval["precision"] == lmms_eval["recall"] == pytest.approx(2 / 3)


def test_pope_pooled_f1_is_not_the_mean_of_f1s():
    rows = pope_rows("random", 8, 0, 1, 0) + pope_rows("popular", 1, 4, 4, 1)
    scores = pope_scores(rows, "lmms_eval")
    assert scores["f1"] == pytest.approx((1 + 2 / 7) / 2)
    assert scores["pooled_f1"] == pytest.approx(2 * 9 / (2 * 9 + 4 + 1))


def test_pope_divisions_by_nothing():
    for rows in (pope_rows("random", 0, 0, 5, 0), pope_rows("random", 0, 0, 0, 5), pope_rows("random", 0, 5, 0, 0)):
        for scoring in ("llava", "lmms_eval"):
            assert pope_scores(rows, scoring)["f1"] == 0
    assert pope_scores([]) == {}


def test_failed_samples_are_wrong_and_stay_in_the_denominator():
    rows = [*pope_rows("random", 3, 0, 3, 0), POPERow("random", "yes", None), POPERow("random", "no", None)]
    scores = pope_scores(rows)
    assert scores["accuracy"] == 75
    assert scores["yes_rate"] == 3 / 8
    assert (scores["precision"], scores["recall"]) == (1, 0.75)
    failed = mme_scores([MMERow("count", "1", "Yes", "Yes"), MMERow("count", "1", "No", None)])
    assert (failed["count_accuracy"], failed["count_accuracy_plus"]) == (50, 0)


def test_unknown_scoring_names_the_valid_ones():
    for call in (
        lambda: gqa_correct("x", "x", "vlmeval"),
        lambda: scienceqa_correct("A", "A", 2, "vlmeval"),
        lambda: mme_answer("x", "vlmeval"),
        lambda: pope_answer("x", "vlmeval"),
        lambda: pope_scores([], "vlmeval"),
    ):
        with pytest.raises(ValueError, match="llava, lmms_eval"):
            call()


def test_standard_error_and_bootstrap():
    rng = random.Random(0)
    scores = [rng.choice([0, 0, 0.5, 1]) for _ in range(218)]
    error = stdev(scores) / 218**0.5
    assert standard_error(scores) == pytest.approx(error)
    spread = bootstrap(scores, n_resamples=4000)
    assert spread.sd == pytest.approx(error, rel=0.06)
    assert spread.low == pytest.approx(fmean(scores) - 1.96 * error, abs=0.3 * error)
    assert spread.high == pytest.approx(fmean(scores) + 1.96 * error, abs=0.3 * error)
    assert bootstrap(scores, n_resamples=4000) == spread
    assert bootstrap(scores, n_resamples=4000, seed=1) != spread
    assert bootstrap(scores, n_resamples=4000, n_items=33).sd == pytest.approx(stdev(scores) / 33**0.5, rel=0.06)
    assert bootstrap([0.5] * 10, n_resamples=100) == (0, 0.5, 0.5)
    for function in (standard_error, bootstrap):
        with pytest.raises(ValueError, match="two scores or more"):
            function([1.0])
