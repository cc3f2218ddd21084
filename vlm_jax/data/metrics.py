"""Scores one prediction against its gold answers. :mod:`eval.judging` aggregates the scores over a task."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

LETTERS = string.ascii_uppercase


def normalise(text: str) -> str:
    """The text in lower case, with white space collapsed, and without quotes or ``.,;:!?`` at its ends."""
    return re.sub(r"\s+", " ", text).strip().strip("\"'.,;:!? ").lower()


#: What the VQA evaluation treats as punctuation. Apostrophes and colons are not part of it; full stops have their own
#: rule.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_ARTICLES = {"a", "an", "the"}
#: The VQA evaluation restores an apostrophe where exactly one is missing from one of these words. Its table also has
#: I'm, I've and I'd've. They never apply, because the text is in lower case by then.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_APOSTROPHE_MISSING = {
    word[: at.start()] + word[at.end() :]: word for word in _CONTRACTIONS for at in re.finditer("'", word)
}


def evalai(text: str) -> str:
    """The text as EvalAI's server normalises predictions and answers for VQA accuracy.

    The text becomes lower case. Commas and question marks are removed, and ``'s`` becomes a separate word. Any other
    mark is removed if the text has a space beside one such mark; otherwise it becomes a space. Full stops are removed
    unless a digit follows. Number words up to ten become digits, articles are removed, and apostrophes are restored in
    contractions.
    """
    text = " ".join(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").split())
    for mark in _PUNCTUATION:
        # Placeholders stand for "removed" and "space" until all marks are done, so that their order does not matter.
        text = text.replace(mark, "\0" if f"{mark} " in text or f" {mark}" in text else "\1")
    text = re.sub(r"\.(?!\d)", "", text.replace("\0", "").replace("\1", " "))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_APOSTROPHE_MISSING.get(word, word) for word in words if word not in _ARTICLES)


NORMALISATIONS: Mapping[str, Callable[[str], str]] = {"strip": str.strip, "lower": normalise, "evalai": evalai}
"""Name -> normalisation that exact match can use: stripped white space, :func:`normalise` or :func:`evalai`."""


def exact_match(
    prediction: str,
    answers: Sequence[str],
    normalisation: Literal["strip", "lower", "evalai"] = "lower",
    multi_gold: Literal["any", "first"] = "any",
) -> bool:
    """Whether the normalised prediction equals a normalised gold answer (P0's metric).

    Args:
        multi_gold: "any" accepts all gold answers, "first" only ``answers[0]``, which most annotators gave.

    A text that normalisation would empty (the letter A is an article) gets a weaker normalisation.
    """
    reply, golds = _forms(prediction, answers, normalisation, multi_gold)
    return reply in golds


def prefix(
    prediction: str,
    answers: Sequence[str],
    normalisation: Literal["strip", "lower", "evalai"] = "lower",
    multi_gold: Literal["any", "first"] = "any",
) -> bool:
    """Whether the normalised prediction begins with a normalised gold answer, as whole words: "Paris." and "Paris,
    which" begin with "Paris", "Parisian" does not. Arguments as for :func:`exact_match`."""
    reply, golds = _forms(prediction, answers, normalisation, multi_gold)
    return any(gold and _place(gold).match(reply) for gold in golds)


def contains(
    prediction: str,
    answers: Sequence[str],
    normalisation: Literal["strip", "lower", "evalai"] = "lower",
    multi_gold: Literal["any", "first"] = "any",
) -> bool:
    """Whether a normalised gold answer is anywhere in the normalised prediction, as whole words. Arguments as for
    :func:`exact_match`. It also accepts what is denied ("not Paris") and lists of guesses."""
    reply, golds = _forms(prediction, answers, normalisation, multi_gold)
    return any(gold and _place(gold).search(reply) for gold in golds)


def _forms(prediction: str, answers: Sequence[str], normalisation: str, multi_gold: str) -> tuple[str, list[str]]:
    """The normalised prediction and the normalised gold answers that are accepted."""

    def form(text: str) -> str:
        return NORMALISATIONS[normalisation](text) or normalise(text) or text.strip()

    return form(prediction), [form(answer) for answer in (answers if multi_gold == "any" else answers[:1])]


def _place(text: str) -> re.Pattern[str]:
    """Finds a text where it is not a part of a longer word or number. Scripts without spaces between words have no such
    borders."""
    begins, ends = (r"(?<!\w)" if _spaced(text[0]) else "", r"(?!\w)" if _spaced(text[-1]) else "")
    return re.compile(begins + re.escape(text) + ends)


def _spaced(character: str) -> bool:
    """Whether words with this character are written with spaces between them (not so in Chinese, Japanese or Thai)."""
    return character.isalnum() and not re.match("[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", character)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1) against all annotators but one, averaged over the one that is left out (Antol et al. 2015).

    The formula is for ten annotators. With fewer than four, all of the others must match. With one, its answer must
    match.
    """
    # A text that consists of articles ("A") is kept, because otherwise an empty prediction would match it.
    reply, *golds = (evalai(text) or normalise(text) for text in (prediction, *answers))
    if len(golds) == 1:
        return float(reply == golds[0])
    matches, needed = golds.count(reply), min(3, len(golds) - 1)
    return sum(min((matches - (gold == reply)) / needed, 1.0) for gold in golds) / len(golds)


def anls(prediction: str, answers: Sequence[str], tau: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019, equation 1).

    NL is the number of edits divided by the length of the longer text. The score is 1 - NL for the nearest gold answer
    if its NL is below ``tau``, else 0. Case is ignored, and white space is collapsed.
    """
    reply = " ".join(prediction.lower().split())
    nearest = min(_normalised_distance(reply, " ".join(answer.lower().split())) for answer in answers)
    return 1 - nearest if nearest < tau else 0.0


def _normalised_distance(a: str, b: str) -> float:
    return _levenshtein(a, b) / max(len(a), len(b), 1)


def _levenshtein(a: str, b: str) -> int:
    """The number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def extract_yes_no(prediction: str) -> Literal["yes", "no"] | None:
    """The first word if it is yes, no, y or n. Otherwise the one of "yes" and "no" that the reply contains; None if it
    contains both or neither."""
    words = re.findall(r"\w+", prediction.lower())
    first = words[0] if words else ""
    if first in ("yes", "y"):
        return "yes"
    if first in ("no", "n"):
        return "no"
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def relaxed_match(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> bool:
    """Whether a number is within a relative ``tolerance`` of a gold number (Methani et al. 2020; ChartQA, Masry et al.
    2022, section 5.1).

    ``25%`` is 0.25. All else must be equal except for case: texts, a gold 0, and numbers that Python cannot read
    (``1,000``).
    """
    return any(_relaxed(prediction.strip(), answer.strip(), tolerance) for answer in answers)


def _relaxed(reply: str, gold: str, tolerance: float) -> bool:
    number, target = _number(reply), _number(gold)
    if number is None or not target:
        return reply.lower() == gold.lower()
    return abs(number - target) / abs(target) <= tolerance


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
