"""Reads which choice of a question a reply names, by rules.

A reply is cut into tokens: words, punctuation and ends of lines. A *mention* is a choice's letter or text. Mentions
that are joined ("A and B", "cat or dog") form a group, because together they name no single choice. A group can be
denied ("not B", "B is wrong"), stated ("the answer is B") or marked ("B. a cat").
"""

import itertools
import re
import string
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.data.metrics import LETTERS, normalise

#: While a reply is cut into tokens, this character plus i stands for choice i's text.
_FIRST_MASK = 0xE000
#: In place of a mention, where only words matter.
_MENTIONED = "\0"
#: An end of line, an abbreviation ("e.g."), a word ("isn't", "C++") or one other character.
_TOKEN = re.compile(r"\n|(?:[^\W\d_]\.){2,}|\w+(?:['-]\w+)*[+#]*|[^\w\s]")
#: Emphasis, code, formulas.
_MARKUP = re.compile(r"\*+|`+|\$+|(?<!\w)_+|_+(?!\w)|\\(?:text|textbf|mathrm|mathbf)\b")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the rules know of English, in lower case. All other words are alike.

#: What may surround a letter that is the whole reply. C++ and A# are no letters.
_AROUND = string.whitespace + "".join(set(string.punctuation) - set("+#"))
_OPENING, _CLOSING = _words("( [ { \" ' < "), _words(") ] } \" ' >")
_MARKS = _words(". , ; : ! ? ) ]")
_ARTICLES = _words("a an the")
#: Words that do not follow an article, so an "A" before them is a letter; and those that do not follow "I".
_NOT_AFTER_ARTICLE = _words(
    "is was are be isn't wasn't because since as given and or but nor for so the this that it these there if in of to "
    "with while whereas not has have does do can could will would should may might must seems looks appears"
)
_NOT_AFTER_I = _words("is isn't because since")
#: Words that say that a choice follows, and what may stand between them and the choice.
_STATING = _words("answer answers choose chose chosen choosing select selected selecting pick picked go going correct")
_NOUNS = _words("option choice letter")
#: Nouns whose letter is a name ("in image B") behind one of these words.
_PICTURES, _PLACES = _words("image picture figure panel photo frame"), _words("in on from of at within")
_LINKS = _words("is was be would should must will : =")
_BETWEEN = (_OPENING | _NOUNS | _LINKS | _ARTICLES | {"\n"}) | _words(
    "to this that question for of my final best clearly definitely probably likely most therefore thus with - >"
)
#: What stands behind a choice that is approved or found wrong.
_VERBS = _words("is are was were be being does do can could must will would seems looks appears")
_DEGREES = _ARTICLES | _words("most more clearly definitely obviously probably likely just also both all my final")
_APPROVING = _words("correct right answer best")
_FAULTS = _words("wrong incorrect")
_DENYING = _FAULTS | _words(
    "not no none never neither nor without except excluding unlike false unlikely eliminate eliminated eliminating "
    "reject rejected exclude excluded besides doubt doubtful impossible refuse refused"
)
_NEGATED_VERB = re.compile(
    r"cannot|(?:is|are|was|were|do|does|did|ca|could|wo|would|should|has|have|had|must|need|ai)n'?t"
)
#: In "Yes, there is no dog", no is no answer.
_NO_OF_THEM = re.compile(r"^(\W*yes[,.] (?:\w+ ){0,4})no (?!(?:or|and)\b)(?=\w)", re.IGNORECASE)
#: Letters of full width, as Chinese replies have them -> plain ones.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
#: "B can be ruled out" and "rule B out".
_RULED_OUT = re.compile(r"\brul(?:e|ed|ing) ((?:option |choice )?\S+) out\b", re.IGNORECASE)
#: Phrases -> the one word that means the same here.
_PHRASES = {
    "not": "(?:rather|other) than|instead of|apart from|as opposed to|any(?:thing)? but|all but|rul(?:e|ed|ing) out",
    "and": "as well as|along with",
    "": "(?:no|little) doubt|(?:without|beyond) (?:a |any )?doubt|(?:don't|do not) doubt|not only",
}
#: What joins mentions, and what else may stand between joined ones.
_JOINING = _words(", ; / & + and or nor")
#: Words that judge a choice before them, and what stands between: "A - no", "B? Yes."
_VERDICTS = _APPROVING | _FAULTS | _words("yes no false true")
_BEFORE_VERDICT = _words("- \u2013 \u2014 : ?")
_HEDGES = _words("either both all also maybe perhaps possibly probably likely more most")
_BESIDE_JOINING = _OPENING | _CLOSING | _NOUNS | _DEGREES | _HEDGES | _words("options choices")
#: What may stand between a letter and its own text, and before a marked letter in its line.
_BEFORE_TEXT = _ARTICLES | _OPENING | _CLOSING | _words(". , : = - \u2013")
_BEFORE_MARKED = _OPENING | _NOUNS | _words("- \u2022 #")
_SENTENCE_ENDS = _words("; . ! ?") | {"\n"}
_CLAUSE_ENDS = _SENTENCE_ENDS | _words(", \u2013 \u2014 but so therefore thus hence however")
#: Words that begin a clause which explains or compares, and so names no choice.
_EXPLAINING = _words("because since as given considering due whereas while though although")


def extract_choice(prediction: str, choices: Sequence[str], *, lettered: bool) -> int | None:
    """The index of the choice that a reply names; None if it names none or several.

    The first of these rules that finds any choice decides:

    1. The reply is a choice's letter: ``b``, ``(B)``, ``B.``.
    2. The reply is a choice's text.
    3. The reply states a choice: ``the answer is (B)``, ``B is correct``. The last statement counts.
    4. A line begins with a marked letter: ``B. a cat``, ``(b) a cat``, ``B, the one on the left``.
    5. The reply mentions letters.
    6. The reply mentions choices' texts. If one text contains another, the longer one counts.

    Letters count only if the question showed them (``lettered``). No mention is an article (``A dog``), a pronoun
    (``I think``), an initial, a letter inside a choice's text, or what is said in an explanation (``C, because A is too
    small``). What is denied does not count. Joined choices (``A or B``) are several.
    """
    reply = _plain(prediction)
    bare = reply.strip(_AROUND).upper()
    if lettered and len(bare) == 1 and bare in LETTERS[: len(choices)]:
        return LETTERS.index(bare)
    forms = [normalise(choice) for choice in choices]
    if (form := normalise(prediction)) and forms.count(form) == 1:
        return forms.index(form)
    if sorted(forms) == ["no", "yes"]:
        reply = _NO_OF_THEM.sub(r"\1", reply)
    groups = _Reply(reply, [normalise(_plain(choice)) for choice in choices], lettered).groups()
    denied = {choice for group in groups if group.denied for choice in group.choices}
    kept = [group for group in groups if not group.denied]
    for found in (
        _last_stated(kept),
        [group.choices for group in kept if group.marked],
        [group.choices - denied for group in kept if group.by_letter],
    ):
        if named := set().union(*found):
            return named.pop() if len(named) == 1 else None
    named = set().union(*(group.choices for group in kept)) - denied
    named = {i for i in named if not any(forms[i] != forms[j] and forms[i] in forms[j] for j in named)}
    return named.pop() if len(named) == 1 else None


def _last_stated(groups: Sequence["_Group"]) -> list[frozenset[int]]:
    """The choices of the last statement, and of those before it if it adds to them ("A is also correct")."""
    stated = [group for group in groups if group.stated]
    first = next((i for i in reversed(range(len(stated))) if not stated[i].also), 0)
    return [group.choices for group in stated[first:]]


def _plain(text: str) -> str:
    """The text without markup, with straight quotes, and with one word for each of :data:`_PHRASES`."""
    text = text.translate(_FULL_WIDTH)
    text = re.sub("[\0\ue000-\uf8ff]", "", text.translate(_STRAIGHT)).replace("\\boxed", " answer ")
    text = _RULED_OUT.sub(r"not \1", text)
    text = _MARKUP.sub("", text)
    for word, phrases in _PHRASES.items():
        text = re.sub(rf"\b(?:{phrases})\b", word, text, flags=re.IGNORECASE)
    return text


class _Mention(NamedTuple):
    """Tokens ``begin`` to ``end`` (excluded) of a reply. A text that several choices have stands for all of them."""

    choices: frozenset[int]
    by_letter: bool
    begin: int
    end: int


class _Group(NamedTuple):
    """Mentions that are joined, some of them letters or none (``by_letter``)."""

    choices: frozenset[int]
    by_letter: bool
    stated: bool
    also: bool
    """Whether it is stated beside others: "is also correct"."""
    marked: bool
    denied: bool


class _Reply:
    """The tokens of a reply, and what they say of the choices.

    Args:
        forms: the choices' texts, normalised.
    """

    def __init__(self, reply: str, forms: Sequence[str], lettered: bool):
        self.forms, self.letters = forms, LETTERS[: len(forms)] if lettered else ""
        self.tokens = _TOKEN.findall(self._masked(reply))
        self.words = [token.lower() for token in self.tokens]
        self.sentences, self.clauses = self._bounds(_SENTENCE_ENDS), self._bounds(_CLAUSE_ENDS)
        self.judges = True
        self.denials = [i for i, word in enumerate(self.words) if word in _DENYING or _NEGATED_VERB.fullmatch(word)]
        self.mentions = self._mentions()
        self.begins = [mention.begin for mention in self.mentions]
        # One "no" behind a choice may be its text ("B: No"); of several, each judges its own ("A: no, B: yes").
        self.judges = sum(self._verdict(mention.end) in _VERDICTS for mention in self.mentions) > 1

    def groups(self) -> list[_Group]:
        """The groups of mentions outside of explanations."""
        explained = self._explained()
        runs: list[list[_Mention]] = []
        for mention in self.mentions:
            if mention.begin in explained:
                continue
            if runs and self._joined(runs[-1], mention):
                runs[-1].append(mention)
            else:
                runs.append([mention])
        return [self._group(run) for run in runs]

    def _group(self, run: list[_Mention]) -> _Group:
        first, last = run[0], run[-1]
        letters = [mention for mention in run if mention.by_letter]
        return _Group(
            frozenset().union(*(mention.choices for mention in run)),
            bool(letters),
            stated=self._introduced(first.begin)
            or self._approved(last.end)
            or (first.by_letter and self._opened(first.begin)),
            also="also" in self.words[last.end : self.skip(last.end, _CLOSING | _VERBS | _DEGREES)],
            marked=any(map(self._marked, letters)),
            denied=self._denied(first.begin, last.end),
        )

    # Tokens.

    def _masked(self, reply: str) -> str:
        """The reply with one character in place of each choice's text, the longer one where two begin. A single letter
        is no text. Choices with the same text share the character of the first."""
        texts = sorted({form for form in self.forms if len(form) > 1 or form.isdigit()}, key=len, reverse=True)
        if not texts:
            return reply
        patterns = [r"\s+".join(map(re.escape, text.split())) for text in texts]
        # A number is not found inside of another one, nor behind a minus sign.
        patterns = [
            rf"((?<![-])(?<!\d[.,]){p})" if text[0].isdigit() else f"({p})"
            for text, p in zip(texts, patterns, strict=True)
        ]

        def mask(match: re.Match) -> str:
            return f" {chr(_FIRST_MASK + self.forms.index(texts[(match.lastindex or 1) - 1]))} "

        pattern = rf"(?<!\w)(?<!\w[-'])(?:{'|'.join(patterns)})(?!\w|[.,]\d|-\w|'(?!s\b)\w)"
        return re.sub(pattern, mask, reply, flags=re.IGNORECASE)

    def at(self, i: int) -> str:
        """Token ``i`` in lower case; an end of line before the first and behind the last token."""
        return self.words[i] if 0 <= i < len(self.words) else "\n"

    def skip(self, i: int, words: frozenset[str], step: int = 1) -> int:
        """The first position from ``i`` on whose token is not one of ``words``."""
        while 0 <= i < len(self.words) and self.words[i] in words:
            i += step
        return i

    def _bounds(self, ends: frozenset[str]) -> list[tuple[int, int]]:
        """Begin and end of the sentence or clause that each token is in."""
        at = [-1, *(i for i, word in enumerate(self.words) if word in ends), len(self.words)]
        return [(low + 1, high) for low, high in itertools.pairwise(at) for _ in range(low, high)]

    def _is_word(self, i: int) -> bool:
        return self.at(i)[0].isalnum() or self.at(i) == _MENTIONED or self._text_at(i) is not None

    def _text_at(self, i: int) -> int | None:
        """The choice whose text is token ``i``."""
        number = ord(self.tokens[i][0]) - _FIRST_MASK if 0 <= i < len(self.tokens) else -1
        return number if 0 <= number < len(self.forms) else None

    # Mentions.

    def _mentions(self) -> list[_Mention]:
        found: list[_Mention] = []
        for i, token in enumerate(self.tokens):
            text = self._text_at(i)
            if text is not None:
                same = frozenset(j for j, form in enumerate(self.forms) if form == self.forms[text])
                last = found[-1] if found else None
                if last and last.by_letter and last.choices <= same and self.skip(last.end, _BEFORE_TEXT) == i:
                    found[-1] = last._replace(end=i + 1)  # a letter and its own text
                else:
                    found.append(_Mention(same, False, i, i + 1))
            elif self._is_letter(i):
                found.append(_Mention(frozenset([self.letters.index(token.upper())]), True, i, i + 1))
            if found and found[-1].end == i + 1:
                self.words[i] = _MENTIONED
        # The letter in "in image B" names a picture, unless it is all that is named.
        named = [m for m in found if self.at(m.begin - 1) not in _PICTURES or self.at(m.begin - 2) not in _PLACES]
        return named or found

    def _is_letter(self, i: int) -> bool:
        """Whether token ``i`` is a choice's letter."""
        token, before, after = self.tokens[i], self.at(i - 1), self.at(i + 1)
        if len(token) > 1 or token.upper() not in self.letters or self._is_initial(i):
            return False
        if (before in _OPENING and after in _CLOSING) or before in _NOUNS:
            return True
        if before[-1].isdigit() or before == "\u00b0":  # as in 20 C
            return False
        if token in "AaIi" and self._is_word(i + 1):
            follow = {"A": _NOT_AFTER_ARTICLE, "I": _NOT_AFTER_I}.get(token, ())
            return after in follow or (token.isupper() and self.tokens[i + 1] in tuple(self.letters))
        # A small letter at the end may be the beginning of a word that was cut off.
        opened = self._opened(i) and token not in "ai"
        return token.isupper() or after in _MARKS or self._introduced(i) or opened or self._opens_line(i)

    def _is_initial(self, i: int) -> bool:
        """Whether token ``i`` is part of a name: John C. Reilly, C. S. Lewis."""
        around = [self.tokens[j] if 0 <= j < len(self.tokens) else "" for j in range(i - 2, i + 4)]
        before_last, before, _, after, name, after_name = around
        if after != ".":
            return False
        initials = (len(name) == 1 and name.isupper() and after_name == ".") or (
            before == "." and len(before_last) == 1 and before_last.isupper()
        )
        first_name = before.istitle() and len(before) > 1 and before.lower() not in _STATING | _NOUNS
        return initials or (first_name and name.istitle())

    def _joined(self, run: list[_Mention], other: _Mention) -> bool:
        between = [self.at(i) for i in range(run[-1].end, other.begin)]
        joining = _JOINING.intersection(between)
        if not between:
            return True
        if not joining or not set(between) <= _JOINING | _BESIDE_JOINING:
            return False
        if not joining <= {",", ";"}:
            return True
        # A comma alone joins the entries of a list, but not two statements ("it is not B, C").
        behind = self.skip(other.end, _CLOSING)
        listed = not self._is_word(behind) or self.at(behind) in _JOINING
        return listed and not self._denied(run[0].begin, run[-1].end)

    # What is said of mentions.

    def _explained(self) -> set[int]:
        """The tokens of clauses that explain. Such a clause reaches to the end of its sentence if a choice was
        mentioned before it there, else to the next comma."""
        explained: set[int] = set()
        for i, word in enumerate(self.words):
            if word not in _EXPLAINING or i in explained:
                continue
            begin, end = self.sentences[i]
            comma = next((j for j in range(i, end) if self.words[j] == ","), None)
            if comma is not None and not _any_between(self.begins, begin, i):
                end = comma
            if comma is not None or _any_between(self.begins, 0, i):
                explained.update(range(i, end))
        return explained

    def _introduced(self, begin: int) -> bool:
        """Whether words such as "the answer is" or "my choice:" stand before."""
        stop = self.skip(begin - 1, _BETWEEN, -1)
        words = [self.at(i) for i in range(stop + 1, begin)]
        after_noun = next((words[i + 1 :] for i in reversed(range(len(words))) if words[i] in _NOUNS), [])
        return self.at(stop) in _STATING or not _LINKS.isdisjoint(after_noun)

    def _opened(self, begin: int) -> bool:
        """Whether "it is" or "that's" stands directly before."""
        before = self.at(begin - 1)
        return before in ("it's", "that's") or (before in ("is", "was") and self.at(begin - 2) in ("it", "that"))

    def _approved(self, end: int) -> bool:
        """Whether words such as "is the right answer" stand behind."""
        verb = self.skip(end, _CLOSING)
        if self._verdict(end) in _APPROVING | {"yes", "true"}:
            return True
        at = self.skip(verb + 1, _VERBS | _DEGREES)
        if self.at(verb) not in _VERBS or self.at(at) not in _APPROVING:
            return False
        return (
            self.at(at) == "answer" or not self._is_word(at + 1) or self.at(at + 1) in _STATING | _NOUNS | _EXPLAINING
        )

    def _verdict(self, end: int) -> str:
        """The single word that judges what ends before token ``end``, as in "A - no"; "" if there is none."""
        at = self.skip(end, _CLOSING | _BEFORE_VERDICT)
        between = _BEFORE_VERDICT.intersection(self.at(i) for i in range(end, at))
        judges = between if self.judges else between & {"?"}
        return self.at(at) if judges and not self._is_word(at + 1) else ""

    def _opens_line(self, begin: int) -> bool:
        return self.at(self.skip(begin - 1, _BEFORE_MARKED, -1)) == "\n"

    def _marked(self, letter: _Mention) -> bool:
        """Whether it is a letter with a mark behind it that begins a line, or that stands before its own text."""
        at = letter.begin + 1
        if self.at(at) == ",":  # but not in a list
            listed = self.at(at + 1) in _JOINING | _HEDGES | {_MENTIONED}
            return self._opens_line(letter.begin) and not listed
        marked = self.at(at) in _MARKS - {"?"} | {"\n", "-", "\u2013"}
        return marked and (self._opens_line(letter.begin) or letter.end > at)

    def _denied(self, begin: int, end: int) -> bool:
        """Whether a denial stands before in the clause ("it is not B"), or is said of it ("B is wrong")."""
        if _any_between(self.denials, self.clauses[begin][0], begin):
            return True
        if self._verdict(end) in _FAULTS | {"no", "false"}:
            return True
        verb = self.skip(end, _CLOSING)
        at = self.skip(verb, _VERBS | _DEGREES)
        negated = _NEGATED_VERB.fullmatch(self.at(verb)) or (at > verb and self.at(at) in _DENYING)
        if not negated and self.at(at) not in _FAULTS:
            return False
        return not _any_between(self.begins, at, self.clauses[at][1])  # else that mention is denied


def _any_between(positions: list[int], low: int, high: int) -> bool:
    """Whether one of the ascending ``positions`` is in ``low`` to ``high`` (excluded)."""
    return bisect_left(positions, low) < bisect_left(positions, high)
