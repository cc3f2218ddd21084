"""Scores of one prediction against its gold answers; :mod:`eval.judging` puts them together over a task."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

LETTERS = string.ascii_uppercase


def normalise(text: str) -> str:
    """Lower case, white space collapsed, and neither quotes nor ``.,;:!?`` around it."""
    return re.sub(r"\s+", " ", text).strip().strip("\"'.,;:!? ").lower()


#: What the VQA evaluation calls punctuation; apostrophes and colons are not, and full stops have a rule of their own.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_ARTICLES = {"a", "an", "the"}
#: The VQA evaluation restores an apostrophe where exactly one is missing from one of these words. (Its table also has
#: I'm, I've and I'd've, which never apply, since the text is in lower case by then.)
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
    """What VQA accuracy compares, as EvalAI's server normalises both sides (Antol et al. 2015; VQAv2, OK-VQA, TextVQA).

    Lower case; no commas and question marks; ``'s`` a word of its own; other punctuation gone where a space is beside
    any of its kind, else a space; full stops gone unless a digit follows; number words up to ten as digits; no
    articles; apostrophes put back into contractions.
    """
    text = " ".join(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").split())
    for mark in _PUNCTUATION:
        # Whether a space is beside the mark is asked of the text as it was, so marks do not depend on their order.
        text = text.replace(mark, "\0" if f"{mark} " in text or f" {mark}" in text else "\1")
    text = re.sub(r"\.(?!\d)", "", text.replace("\0", "").replace("\1", " "))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_APOSTROPHE_MISSING.get(word, word) for word in words if word not in _ARTICLES)


NORMALISATIONS: Mapping[str, Callable[[str], str]] = {"strip": str.strip, "lower": normalise, "evalai": evalai}
"""What exact match may compare: only white space stripped; :func:`normalise`; :func:`evalai`."""


def exact_match(
    prediction: str,
    answers: Sequence[str],
    normalisation: Literal["strip", "lower", "evalai"] = "lower",
    multi_gold: Literal["any", "first"] = "any",
) -> bool:
    """Whether the normalised prediction equals one of the normalised gold answers, or the first of them (P0's measure).

    ``answers[0]`` is the one that most annotators gave. A text of which normalisation leaves nothing (the letter A
    is an article) is compared with less of it.
    """

    def form(text: str) -> str:
        return NORMALISATIONS[normalisation](text) or normalise(text) or text.strip()

    return form(prediction) in {form(answer) for answer in (answers if multi_gold == "any" else answers[:1])}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1) against all annotators but one, averaged over who is left out (Antol et al. 2015).

    It is made for ten annotators. Where the others are fewer than three, all of them must match; a single answer is
    compared as it is.
    """
    # A text that is all articles ("A") stays, lest silence be an answer.
    said, *golds = (evalai(text) or normalise(text) for text in (prediction, *answers))
    if len(golds) == 1:
        return float(said == golds[0])
    matches, needed = golds.count(said), min(3, len(golds) - 1)
    return sum(min((matches - (gold == said)) / needed, 1.0) for gold in golds) / len(golds)


def anls(prediction: str, answers: Sequence[str], tau: float = 0.5) -> float:
    """Average normalised Levenshtein similarity, of one question (Biten et al. 2019, equation 1).

    1 - NL for the nearest gold answer if its NL = edits / length of the longer text is below ``tau``, else 0: an NL of
    just ``tau`` is 0. Case does not count, and white space is collapsed.
    """
    said = " ".join(prediction.lower().split())
    nearest = min(_normalised_distance(said, " ".join(answer.lower().split())) for answer in answers)
    return 1 - nearest if nearest < tau else 0.0


def _normalised_distance(a: str, b: str) -> float:
    return _levenshtein(a, b) / max(len(a), len(b), 1)


def _levenshtein(a: str, b: str) -> int:
    """How many insertions, deletions and substitutions turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def extract_choice(prediction: str, choices: Sequence[str], *, lettered: bool) -> int | None:
    """Which of the ``choices`` a reply names, by rules alone; None if none of them decides.

    In this order: the reply is an option's letter (``b``, ``(B)``, ``B.``); it is an option's text; it begins with a
    marked letter (``B. a cat``); it says which one the answer is (``the answer is (B)``, the last time that it does);
    it holds one option's letter and no other's; it holds one option's text and no other's. Letters count only where
    the question showed them (``lettered``). ``A cat`` and ``not B`` name no letter, letters inside an option's text do
    not count, and of options that hold one another the longest is meant.
    """
    said, forms = normalise(prediction), [normalise(choice) for choice in choices]
    bare = prediction.strip(string.punctuation + string.whitespace).upper()
    if lettered and len(bare) == 1 and bare in LETTERS[: len(choices)]:
        return LETTERS.index(bare)
    if said and forms.count(said) == 1:
        return forms.index(said)
    if lettered and (letter := _letter(prediction, choices)) is not None:
        return letter
    # An option that is but a letter is no text.
    texts = [form for form in forms if len(form) > 1 or form.isdigit()]
    held = {form for form in texts if re.search(rf"(?<![\w.]){re.escape(form)}(?!\w|\.\d)", said)}
    held = {form for form in held if not any(form != other and form in other for other in held)}
    found = [i for i, form in enumerate(forms) if form in held]
    return found[0] if len(found) == 1 else None


def _letter(reply: str, choices: Sequence[str]) -> int | None:
    """The option whose letter a longer reply names."""
    letters = f"[{LETTERS[: len(choices)]}]"
    for choice in sorted((choice for choice in choices if len(choice) > 1), key=len, reverse=True):
        reply = re.sub(rf"(?<!\w){re.escape(choice)}(?!\w)", "\0", reply, flags=re.IGNORECASE)
    if opening := re.match(rf"[\s*(\[\"']*({letters})[).:\]*]+(?=\s|\0|$)", reply):
        return LETTERS.index(opening[1])
    between = r"(?:\s*(?::|\b(?:is|would be|option|choice)\b))*[\s*(\[\"']*"
    if stated := re.findall(rf"\b(?i:answer|choose|select|pick)\b{between}({letters})(?![\w'])", reply):
        return LETTERS.index(stated[-1])
    # "A" before a word is an article, "I" a pronoun.
    article = r"(?![AI]\s+(?!is\b|because\b)[a-z\0])"
    loose = set(re.findall(rf"(?<!not )(?<!not \()(?<![\w'])(?:{article})({letters})(?![\w'])", reply))
    return LETTERS.index(loose.pop()) if len(loose) == 1 else None


def extract_yes_no(prediction: str) -> Literal["yes", "no"] | None:
    """The first word if it is yes or no (or y or n), else whichever of the two the reply holds; None for both or
    neither."""
    words = re.findall(r"\w+", prediction.lower())
    first = {"y": "yes", "n": "no"}.get(words[0], words[0]) if words else None
    if first in ("yes", "no"):
        return first
    held = {"yes", "no"} & set(words)
    return held.pop() if len(held) == 1 else None


def relaxed_match(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> bool:
    """Whether a number is within ``tolerance`` of a gold one, relative to it; other answers must be equal but for case
    (Methani et al. 2020; ChartQA, Masry et al. 2022, section 5.1).

    ``25%`` is 0.25. A gold 0, and what Python does not read as a number (``1,000``), are compared as texts.
    """
    return any(_relaxed(prediction.strip(), answer.strip(), tolerance) for answer in answers)


def _relaxed(said: str, gold: str, tolerance: float) -> bool:
    number, target = _number(said), _number(gold)
    if number is None or not target:
        return said.lower() == gold.lower()
    return abs(number - target) / abs(target) <= tolerance


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
