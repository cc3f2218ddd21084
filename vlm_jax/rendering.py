"""Writes an example as the text that a model reads: its message in the chat template, with the tokens of its images.

A template may change the message, as Gemma's, which trims white space. So it is rendered with the message itself. To
find the question there, it is rendered once more with a placeholder for each text of the message: what stands around
the placeholders is the template's own. That second rendering serves all examples with the same order of texts and
images.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vlm_jax.data import Example
from vlm_jax.data.example import IMAGE_MARK, without_leading_marks
from vlm_jax.errors import UserError
from vlm_jax.families.base import Chat
from vlm_jax.processor import Processor
from vlm_jax.time_limit import time_limit

#: This private-use character plus i is the placeholder for the i-th text of a message.
_PLACEHOLDER = 0xE000
#: A template is code that comes with a model, so its time and what it writes have a bound.
_SECONDS, _LONGEST = 3, 10_000_000


class Rendered(NamedTuple):
    """A text and its spans."""

    text: str
    spans: list[tuple[str, int, int]]
    """(Name, first character, last character + 1). A name may occur several times."""


class _Text(NamedTuple):
    """A text of a message, and the parts of it that belong to the question and to its subject: name -> (first
    character, last character + 1), which are equal if there is none."""

    text: str
    parts: dict[str, tuple[int, int]]


class Renderer:
    """Renders the examples of one model."""

    def __init__(self, processor: Processor, chat: Chat):
        self._processor, self._chat = processor, chat
        self._frames: dict[tuple[bool, ...], list[str]] = {}  # by the kinds of a message's parts, in the chat template
        tokenizer = processor.tokenizer
        # Some special tokens have a name; others are only marked as special in the vocabulary.
        marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        own = {chat.image, chat.placeholder, IMAGE_MARK}
        self._special_tokens = sorted({*marked, *tokenizer.all_special_tokens, *own} - {""})
        _check_template(tokenizer.chat_template or processor.chat_template or "")
        has_template = tokenizer.chat_template or processor.chat_template
        self._turn_end = (has_template and chat.turn_end) or tokenizer.eos_token

    def __call__(self, example: Example, prompt: str, counts: Sequence[int], with_answer: bool) -> Rendered:
        """The text of an example.

        Args:
            prompt: the user's message, in which ``{QUESTION}`` stands for the question.
            counts: the number of visual tokens of each image.
            with_answer: append the gold answer and the end of its turn.

        Raises:
            UserError: for a special token in the question or the answer; if the marks of images do not fit the images;
                if the template cannot show the message or changes the question.
        """
        _check_texts(example)
        for token in self._special_tokens:
            if token in example.question.replace(IMAGE_MARK, "") or token in example.answers[0]:
                raise UserError(f"example {example.id!r} holds the special token {token!r}: remove it from the text")
        message = _message(example, prompt)
        plain = self._apply([part and part.text for part in message], example.chat_template)
        spans = list(self._find(example, message, plain))
        text, spans = self._with_images(example, plain, spans, counts)
        if with_answer:
            turn_end = self._turn_end if example.chat_template else self._processor.tokenizer.eos_token
            if not turn_end:
                raise UserError(
                    "the tokeniser has no eos_token, so no answer of this model can end: name one in "
                    "tokenizer_config.json"
                )
            # If the prompt ends in a word, a space comes before the answer and belongs to its first token, as in any
            # text.
            answer = text + ("" if text[-1:].isspace() else " ") + example.answers[0].strip()
            spans += [("answer", len(text), len(answer)), ("end", len(answer), len(answer) + len(turn_end))]
            text = answer + turn_end
        return Rendered(text, spans)

    def _apply(self, parts: Sequence[str | None], chat_template: bool = True) -> str:
        """The chat template with a message of texts and images (None), or the bare message."""
        if not chat_template:
            return "".join(self._chat.placeholder if part is None else part for part in parts)
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        try:
            turns = [{"role": "user", "content": content}]
            with time_limit(_SECONDS):
                text = self._processor.apply_chat_template(turns, add_generation_prompt=True)
            if len(text) > _LONGEST:
                raise ValueError(f"it writes {len(text):,} characters")
            return text
        except Exception as error:  # a template is code: it can raise errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the model's chat template cannot show a question ({reason}): use an instruction-tuned checkpoint"
            ) from None

    def _frame(self, message: Sequence[_Text | None], chat_template: bool) -> list[str]:
        """What is before, between and behind the texts of a message: what the template writes there, and images."""
        kinds = tuple(part is None for part in message)
        if not chat_template:
            gaps = [""]
            for image in kinds:
                gaps[-1:] = [gaps[-1] + self._chat.placeholder] if image else [gaps[-1], ""]
            return gaps
        if kinds not in self._frames:
            placeholders = [chr(_PLACEHOLDER + i) for i in range(kinds.count(False))]
            unused = iter(placeholders)
            frame = self._apply([None if image else next(unused) for image in kinds])
            if [character for character in frame if character in placeholders] != placeholders:
                raise UserError(
                    "the model's chat template does not show each text of a message once: use an instruction-tuned "
                    "checkpoint"
                )
            self._frames[kinds] = re.split(f"[{''.join(placeholders)}]", frame)
        return self._frames[kinds]

    def _find(self, example: Example, message: Sequence[_Text | None], plain: str) -> Iterator[tuple[str, int, int]]:
        """The bounds of the parts of the question and of its subject in the rendered message."""
        before, *behind = self._frame(message, example.chat_template)
        at = len(before) if plain.startswith(before) else -1
        for part, after in zip([part for part in message if part is not None], behind, strict=True):
            trimmed = part.text.strip()
            lead = part.text.index(trimmed)
            for shown, cut in ((part.text, 0), (part.text.rstrip(), 0), (part.text.lstrip(), lead), (trimmed, lead)):
                if at >= 0 and plain.startswith(shown + after, at):
                    for name, bounds in part.parts.items():
                        begin, end = (at + min(max(i - cut, 0), len(shown)) for i in bounds)
                        if begin < end:
                            yield name, begin, end
                    at += len(shown) + len(after)
                    break
            else:
                at = -1
        if at != len(plain):
            raise UserError(
                f"the model's chat template changes the text of example {example.id!r}, so its question cannot be "
                "found: change the prompt or the template"
            )

    def _with_images(
        self, example: Example, plain: str, spans: list[tuple[str, int, int]], counts: Sequence[int]
    ) -> tuple[str, list[tuple[str, int, int]]]:
        """The text with the tokens of each image in its place, and all spans in it."""
        chat = self._chat
        shown = [found.span() for found in re.finditer(re.escape(chat.placeholder), plain)] if counts else []
        if len(shown) != len(counts):
            raise UserError(
                f"example {example.id!r}: the chat template shows {len(shown)} of {len(counts)} images: use a template "
                "for images"
            )
        text, end, images, shifts = "", 0, [], []
        for (begin, behind), count in zip(shown, counts, strict=True):
            text += plain[end:begin] + chat.before
            images.append(("image", len(text), len(text) + len(chat.image) * count))
            text, end = text + chat.image * count + chat.after, behind
            shifts.append((behind, len(text) - behind))
        text += plain[end:]
        if images and chat.image_end is not None:
            images += [("image_end", *found.span()) for found in re.finditer(re.escape(chat.image_end), text)]

        def moved(at: int) -> int:
            return at + next((shift for behind, shift in reversed(shifts) if behind <= at), 0)

        return text, images + [(name, moved(begin), moved(end)) for name, begin, end in spans]


def _check_template(template: str) -> None:
    """Raises a UserError for a template that computes powers or with huge numbers: no limit of time could end that."""
    import jinja2  # a tenth of a second that a command's --help need not wait

    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return  # rendering it says what is wrong
    tokens = [token for token in tokens if token[1] != "whitespace"]
    for (_, before_kind, before), (line, kind, token), (_, _, after) in zip(
        tokens, tokens[1:], tokens[2:], strict=False
    ):
        operand = before_kind in ("name", "integer", "float", "string") or before in (")", "]")
        power = token == "**" and kind == "operator" and operand  # not that of keyword arguments
        huge = kind == "integer" and len(token) > len("10000000") and "*" in (before, after)
        if power or huge:
            raise UserError(
                f"the model's chat template cannot show a question (line {line} computes with {token[:20]}): use an "
                "instruction-tuned checkpoint"
            )


def _check_texts(example: Example) -> None:
    """Raises a UserError for a question or a gold answer that is no text, or that UTF-8 cannot hold."""
    if not example.answers:
        raise UserError(f"example {example.id!r} has no answer: give at least one")
    for name, text in (("question", example.question), ("answer", example.answers[0])):
        if not isinstance(text, str):
            raise UserError(f"example {example.id!r}: its {name} is {str(text)[:60]!r}, not a text: write a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"example {example.id!r}: its {name} holds half of a surrogate pair: remove it") from None


def _message(example: Example, prompt: str) -> list[_Text | None]:
    """The texts of the user's message and, as None, its images: at their marks, or else before the text.

    Raises:
        UserError: if there are marks, but not one for each image; if the prompt has not one place for the question.
    """
    if prompt.count("{QUESTION}") != 1:
        raise UserError(f"the prompt {prompt[:60]!r} must have {{QUESTION}} once, where the question goes: correct it")
    before, after = prompt.split("{QUESTION}")
    # LLaVA's data begin with the mark and an end of line. These images come before the prompt, as without marks.
    question, leading = without_leading_marks(example.question)
    bounds_of = {"question": (len(before), len(before) + len(question))}
    begin = len(before) + _subject_at(example, question)
    bounds_of["subject"] = (begin, begin + len(question if example.subject is None else example.subject))
    text, more = without_leading_marks(before + question + after)
    cut = len(before + question + after) - len(text)
    marks = [found.span() for found in re.finditer(IMAGE_MARK, text)]
    found, count = leading + more + len(marks), len(example.images)
    if found not in (0, count):
        raise UserError(
            f"example {example.id!r} marks {found} place(s) with {IMAGE_MARK} but has {count} image(s): mark one place "
            "for each, or none"
        )
    message: list[_Text | None] = [None] * (leading + more if found else count)
    bounds = [0, *(i for mark in marks for i in mark), len(text)]
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        parts = {}
        for name, (begin, end) in bounds_of.items():
            parts[name] = min(max(begin - cut, low), high) - low, min(max(end - cut, low), high) - low
        message += [None] * (low > 0) + [_Text(text[low:high], parts)] * (low < high or not text)
    return message


def _subject_at(example: Example, question: str) -> int:
    """The first character of the subject in the question; 0 if the example names none.

    Raises:
        UserError: if the question has not exactly one.
    """
    if example.subject is None:
        return 0
    count = question.count(example.subject) if example.subject.strip() else 0
    if count != 1:
        raise UserError(
            f"example {example.id!r}: its question has the subject {example.subject!r} {count} times: name a part "
            "that it has once"
        )
    return question.index(example.subject)
