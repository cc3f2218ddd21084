"""Which choice a reply names: a table of replies read by hand, choices of other questions, and VLMEvalKit's rule."""

import random
import string

import pytest

from vlm_jax.data import choices as choices_module
from vlm_jax.data.choices import extract_choice

ANIMALS = ("cat", "black cat", "dog", "cow")

#: Replies to a question that showed A. cat, B. black cat, C. dog and D. cow -> the letter that they name, - for none.
REPLIES = {
    "a letter alone": """
        B | B
        b | B
        (B) | B
        B. | B
        "C" | C
        **B** | B
        $\\boxed{D}$ | D
        B? | B
        a | A
        E | -
        C++ | -
    """,
    "a text": """
        Dog. | C
        A dog | C
        A DOG | C
        the dog's | C
        it is a black cat | B
        The animal is the dog in the middle. | C
        a cat and a dog | -
        the cat as well as the dog | -
        either a cat or a dog | -
        dog/cow | -
        a cow, maybe a dog | -
        category | -
        cat-like | -
        who knows | -
        """,
    "a marked letter": """
        B. black cat | B
        b. 4 | B
        a) cat | A
        (C) dog | C
        C: dog | C
        D - cow | D
        B.black cat | B
        B. The correct answer is not A | B
        C. A is too small. | C
        C, the one beside A | C
        Based on the picture it is B. black cat | B
        A. cat B. black cat C. dog D. cow | -
        A. cat\\nB. black cat | -
        C\\nA is too small | C
        A is a cat.\\nB is a black cat.\\nC | C
    """,
    "a statement": """
        The answer is B. | B
        The answer is c. | C
        answer: c | C
        answer: a | A
        Answer:B | B
        the ANSWER is A | A
        **Answer:** C | C
        Final answer:\\nC | C
        <answer>C</answer> | C
        The answer is \\boxed{\\text{B}}. | B
        The answer to this question is C | C
        the correct choice is c | C
        My choice: a | A
        I would choose C | C
        I'd go with D | D
        I choose B over A | B
        Picking between A and B, I choose B | B
        Option B is the correct answer | B
        B is right, A is wrong | B
        D is the best choice | D
        The correct option is C; option A shows a cat | C
        A. cat\\nB. black cat\\nC. dog\\nThe answer is C | C
        The answer is A? No, the answer is D | D
        A was tempting, but the correct answer is option C | C
        The answer is “B” | B
        Answer: A dog | C
        The answer is a dog. | C
        The answer is a bird. | -
        The answer is A or B | -
        The answer is A, B | -
        The answer is either A or B. | -
        Options:\\nA. cat\\nB. black cat | -
    """,
    "verdicts": """
        A - no, B - no, C - yes | C
        A? No. B? No. C? Yes. | C
        A: wrong, B: right | B
        A cat? No, a dog. | C
        B is correct, but A is also correct | -
        A is wrong. B is also correct. | B
        B: no | B
        The answer is B: No. | B
    """,
    "a letter in a sentence": """
        It's c | C
        that's B | B
        Ｂ | B
        A;B | -
        In image B, there is a dog | C
        The answer is in image B | B
        It's a | -
        It is a | -
        It's a d | -
        That's a cat, and it's a dog behind it | -
        The answer is image B | B
        The answer is B. Wait, no, it's C. | C
        option c | C
        Option A. | A
        It must be C | C
        it is c. | C
        I think it's B. | B
        Maybe B | B
        Yes, B. | B
        A is right | A
        B or C | -
        A and B | -
        Both A and C | -
        A, B and C | -
        A/B | -
        A, maybe B | -
        answer: A B | -
    """,
    "an article, a pronoun, a name, a word that was cut off": """
        A bird | -
        A Bird | -
        A dog is there | C
        I think it is a dog | C
        I cannot see it | -
        e.g. a dog | C
        The animal in the image is a | -
        The animal is a b | -
        Franklin D. Roosevelt | -
        C. S. Lewis | -
        A-frame | -
        It's 20 C | -
    """,
    "a denial": """
        Not B | -
        It is not B | -
        The answer isn't B | -
        The answer isn’t B | -
        It cant be A | -
        I don't think it is B | -
        neither A nor B | -
        None of A and B | -
        All except B | -
        anything but B | -
        B is incorrect | -
        B isn't correct | -
        A and B are wrong | -
        B is ruled out | -
        It is not a cat | -
        There is no dog | -
        Neither the cat nor the dog | -
        Not B, but C | C
        The answer is not B but C | C
        B not A | B
        B, not A. | B
        B (not A) | B
        C instead of B | C
        Rather than A, I choose D. | D
        Neither A nor B, so D | D
        The answer isn't A, it's B | B
        not a cat, a dog | C
        a dog, not a cat | C
        There is no cat, only a dog | C
        No, it is a dog | C
        the answer is (C), not B | C
        I'm not sure, but B | B
        No doubt, B | B
        I don't doubt it is B | B
        We can rule B out | -
        Ruling option B out, it is C | C
        I doubt it is B | -
        Little doubt it is B | B
        Beyond doubt, it is B | B
        Any but B | -
        Everything besides B | -
        It is impossible that it is B | -
        I refuse to answer B | -
    """,
    "an explanation": """
        C, because A is too small | C
        c because a is too small | C
        It is C since A and B are cats. | C
        Because A is too small, C | C
        Since A and B are cats, it must be C. | C
        It is B. Because A is small | B
        a cat, while a dog is behind it | A
        Explanation: A is not black. Answer: B | B
    """,
}


def table():
    for kind, lines in REPLIES.items():
        for line in filter(str.strip, lines.split("\n")):
            reply, letter = line.rsplit("|", 1)
            reply = reply.strip().replace("\\n", "\n")
            yield pytest.param(reply, "ABCD".find(letter.strip()), id=f"{kind}: {reply!r}")


@pytest.mark.parametrize("reply, wanted", list(table()))
def test_replies(reply, wanted):
    assert extract_choice(reply, ANIMALS, lettered=True) == (None if wanted < 0 else wanted)


@pytest.mark.parametrize(
    "choices, reply, wanted",
    [
        (("3", "4", "10", "-3"), "3", 0),
        (("3", "4", "10", "-3"), "-3", 3),
        (("3", "4", "10", "-3"), "3.5", None),
        (("3", "4", "10", "-3"), "1,000", None),
        (("3", "4", "10", "-3"), "D: -3", 3),
        (("3", "4", "10", "-3"), "There are 4 dogs", 1),
        (("yes", "no", "maybe"), "No, it is not", 1),
        (("no", "yes"), "Yes, there is no dog", 1),
        (("No", "Yes"), "There is no dog", 0),
        (("yes", "no"), "No. The answer is yes.", 0),
        (("yes", "no"), "Yes or no? No.", None),
        (("yes", "no"), "yes and no", None),
        (("yes", "no"), "Yes, no or maybe", None),
        (("No, it is not", "Yes, it is"), "A: No", 0),
        (("3", "103"), "The answer is 10³.", None),
        (("yes", "no", "maybe"), "The answer is no.", 1),
        (("yes", "no", "maybe"), "I don't think so", None),
        (("The dog is not on the mat.", "The dog is on the mat."), "the dog is not on the mat", 0),
        (("The dog is not on the mat.", "The dog is on the mat."), "The dog is on the mat", 1),
        (("left", "right"), "The cat is right of the dog", 1),
        (("left", "right"), "not left, right", 1),
        (("none of the above", "a bat"), "None of the above", 0),
        (("none of the above", "a bat"), "none of them, a bat", 1),
        (("$5", "5", "5%"), "It costs $5", 0),
        (("New York", "York"), "It is New\nYork", 0),
        (("cat", "Cat", "dog"), "it is a cat", None),
        (("Vitamin C", "Vitamin A", "Vitamin B"), "the answer is vitamin C", 0),
        (("Vitamin C", "Vitamin A", "Vitamin B"), "Vitamin C", 0),
        (("Vitamin C", "Vitamin A", "Vitamin B"), "C", 2),
        (tuple("qrstuvwxyz"), "I", 8),
        (tuple("qrstuvwxyz"), "I is right", 8),
        (tuple("qrstuvwxyz"), "I think B", 1),
        (("",) * 4, "Answer: A dog", None),  # only the question's text has the choices
        (("",) * 4, "The answer is c.", 2),
        (("",) * 4, "D. Black bear", 3),
    ],
)
def test_choices_of_other_questions(choices, reply, wanted):
    assert extract_choice(reply, choices, lettered=True) == wanted


def test_letters_count_only_where_they_were_shown():
    assert extract_choice("B", ANIMALS, lettered=False) is None
    assert extract_choice("(B) dog", ANIMALS, lettered=False) == 2
    assert extract_choice("a dog, not a cat", ANIMALS, lettered=False) == 2
    assert extract_choice("The answer is B: it is not a dog", ANIMALS, lettered=False) is None


@pytest.mark.parametrize(
    "rule, reply, without_it",
    [
        ("_DENYING", "Not B", 1),
        ("_JOINING", "The answer is A or B", 0),
        ("_EXPLAINING", "It must be C because A is too small", None),
        ("_STATING", "A shows a dog, B a cat: the answer is C. Or is D right?", None),
        ("_NOT_AFTER_ARTICLE", "A is right", None),
        ("_MARKS", "C. A is too small", None),
    ],
)
def test_the_table_depends_on_each_rule(rule, reply, without_it, monkeypatch):
    """The control: without a rule's words a reply is read otherwise."""
    assert extract_choice(reply, ANIMALS, lettered=True) != without_it
    monkeypatch.setattr(choices_module, rule, frozenset())
    assert extract_choice(reply, ANIMALS, lettered=True) == without_it


def of_vlmevalkit(reply: str, choices=ANIMALS) -> int | None:
    """The choice that VLMEvalKit finds without asking a model: the one letter among the words, if it is one of the last
    five; else the one text that the reply contains."""
    words = reply.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    letters = [letter for letter in string.ascii_uppercase[: len(choices)] if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return ord(letters[0]) - ord("A")
    texts = [i for i, text in enumerate(choices) if text in reply.lower()]
    return texts[0] if len(texts) == 1 and len(reply) <= 2 * sum(map(len, choices)) else None


def test_plain_replies_are_read_as_vlmevalkit_reads_them():
    forms = ("{}", "({})", "{}.", "**{}**", "The answer is {}", "The answer is ({}).", "Answer: {}", "Option {}")
    for i, letter in enumerate("ABCD"):
        for form in forms:
            assert extract_choice(form.format(letter), ANIMALS, lettered=True) == i
            assert of_vlmevalkit(form.format(letter)) == i
    for reply, i in (("dog", 2), ("a cow", 3), ("It is a dog.", 2)):
        assert extract_choice(reply, ANIMALS, lettered=True) == of_vlmevalkit(reply) == i


@pytest.mark.parametrize(
    "reply, ours, theirs",
    [("Not B", None, 1), ("A dog", 2, 0), ("b", 1, None), ("it is a black cat", 1, None), ("not a dog", None, 2)],
)
def test_where_vlmevalkit_reads_otherwise(reply, ours, theirs):
    """As docs/metrics.md says."""
    assert (extract_choice(reply, ANIMALS, lettered=True), of_vlmevalkit(reply)) == (ours, theirs)


def test_any_reply_is_read():
    """Random words, punctuation and characters: an index or None, and never an error."""
    rng = random.Random(0)
    pieces = [
        *"ABCDabcdI.,():;!?{}'\"\n3-",
        *ANIMALS,
        "not",
        "isn't",
        "or",
        "and",
        "the answer is",
        "option",
        "because",
    ]
    pieces += ["\\boxed", "**", "\u2014", "\u2019", "\ue001", "\0", "\u00e9", "20", "\u00b0", "\U0001f600"]
    read = []
    for _ in range(3000):
        reply = rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randrange(12)))
        read.append(extract_choice(reply, ANIMALS, lettered=rng.random() < 0.7))
    assert set(read) == {None, 0, 1, 2, 3}
    assert extract_choice("A is " * 20_000, ANIMALS, lettered=True) == 0  # in time that grows with the length
