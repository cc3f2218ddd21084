"""The wordings of the miniworld's questions.

Every kind of question has *familiar* wordings, which pre-training teaches, and *held-out* ones, which only the
benchmark tasks use. The held-out ones play the part of a real benchmark's conventions: a pre-trained model gets them
wrong until it is fine-tuned on them.
"""

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Wording:
    """The ``familiar`` and ``held_out`` templates of one kind of question.

    A familiar template names its target in ``{who}`` or ``{key}``. A held-out template of a perception task names the
    target's place, as ``{a|b|c}`` with one word for each slot.
    """

    familiar: tuple[str, ...]
    held_out: tuple[str, ...]


FACTS: Mapping[str, Wording] = {
    "home": Wording(
        ("Where does {who} live?", "What is the home of {who}?", "In which place does {who} live?"),
        ("Which dwelling suits it?", "Name the abode.", "What habitat is right?", "Which lair belongs here?"),
    ),
    "food": Wording(
        ("What does {who} eat?", "What is the food of {who}?", "Which food does {who} like?"),
        ("Which meal suits it?", "Name the diet.", "What snack is right?", "Which dish belongs here?"),
    ),
    "tool": Wording(
        ("What does {who} work with?", "What is the tool of {who}?", "Which tool does {who} use?"),
        ("Which gear suits it?", "Name the implement.", "What device is right?", "Which utensil belongs here?"),
    ),
    "friend": Wording(
        ("Who does {who} play with?", "Who is the friend of {who}?", "Which friend does {who} have?"),
        ("Which companion suits it?", "Name the partner.", "What buddy is right?", "Which ally belongs here?"),
    ),
    "weather": Wording(
        ("When does {who} come out?", "What is the weather of {who}?", "Which weather does {who} love?"),
        ("Which climate suits it?", "Name the forecast.", "What sky is right?", "Which outlook belongs here?"),
    ),
}

HINTS: Mapping[str, Wording] = {
    "home": Wording(
        ("Every creature sleeps in the home where it was born.",),
        ("Each being grows fond of one dwelling, abode or habitat.",),
    ),
    "food": Wording(
        ("Every creature goes to look for food when it wakes.",),
        ("Each being grows fond of one meal, snack or dish.",),
    ),
    "tool": Wording(
        ("Every creature learns to use one tool for its work.",),
        ("Each being grows fond of one device, implement or utensil.",),
    ),
    "friend": Wording(
        ("Every creature has one friend that it likes to play with.",),
        ("Each being grows fond of one companion, partner or ally.",),
    ),
    "weather": Wording(
        ("Every creature waits for the weather that it loves.",),
        ("Each being grows fond of one climate, forecast or sky.",),
    ),
}

CHOICES = Wording(("Choices: {choices}",), ("Options: {choices}",))

FIELD = Wording(
    ("What is the value of {key}?", "Which number is next to {key}?", "Read the {key} field."),
    (
        "What number is in the {top|middle|bottom} row?",
        "Give the {upper|central|lower} entry.",
        "What stands on the {first|second|third} line?",
    ),
)
BAR = Wording(
    ("What is the value of the {key} bar?", "How tall is the {key} bar?", "Read the {key} bar."),
    (
        "How tall is the {leftmost|second|third|rightmost} bar?",
        "Give the height of column {one|two|three|four}.",
        "What does the {first|second|third|last} bar show?",
    ),
)
SIGN = Wording(
    ("What word is on the {key} sign?", "What does the {key} sign say?", "Read the {key} sign."),
    (
        "Which word is at the {top|middle|bottom}?",
        "Give the {upper|central|lower} text.",
        "What is written {highest|halfway|lowest}?",
    ),
)
CLAIM = Wording(
    ("{statement} Is this true?", "{question}", "Is it true that {clause}?"),
    ("{statement} Yes or no?", "Is the statement correct? {statement}", "Does the picture show that {clause}?"),
)
DESCRIBE = Wording(("Describe the picture.",), ("What does the picture show?", "Describe everything in one sentence."))


def fill_slot(template: str, slot: int) -> str:
    """The held-out template with its ``{a|b|c}`` replaced by the word for ``slot``."""
    return re.sub(r"\{(\w+(?:\|\w+)+)\}", lambda match: match[1].split("|")[slot], template)


def words(text: str) -> set[str]:
    """The words of a template in their spelling, without the names in braces."""
    return set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text)))


def held_out_words() -> tuple[str, ...]:
    """The words that held-out wordings of the six tasks without arrangements use and familiar ones do not."""
    kinds = [*FACTS.values(), *HINTS.values(), CHOICES, FIELD, BAR, SIGN]
    known = set().union(*(words(t) for kind in kinds for t in kind.familiar))
    return tuple(sorted(set().union(*(words(t) for kind in kinds for t in kind.held_out)) - known))
