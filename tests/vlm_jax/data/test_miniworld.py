"""The miniworld is deterministic, its splits are apart, its answers are true, and its wordings are kept back."""

import collections
import functools
import hashlib
import re

import numpy as np
import pytest

from vlm_jax.data import pretraining, wordings
from vlm_jax.data.draw import FONTS, SIZE, draw_scene
from vlm_jax.data.miniworld import HELD_OUT_SHARE, SPLIT_SIZES, TASKS, make_example, make_scene
from vlm_jax.data.scenes import Chart, Emblem, Form, Glyphs, Signs, transcript
from vlm_jax.data.world import COLOUR_RGB, ENTITIES, RELATIONS, SHAPES

KNOWLEDGE = [name for name, task in TASKS.items() if task.family == "knowledge"]
PERCEPTION = [name for name, task in TASKS.items() if task.family == "perception"]
#: The tasks that the embedded Qwen3-VL was trained for; nothing about them may change.
FIRST_SIX = KNOWLEDGE + PERCEPTION
STREAMS = {
    "text_fact": pretraining.text_fact,
    "alignment": pretraining.alignment,
    "easy alignment": lambda index: pretraining.alignment(index, 0.0),
    "instruction": pretraining.instruction,
    "spatial text_fact": functools.partial(pretraining.text_fact, spatial=True),
    "spatial alignment": functools.partial(pretraining.alignment, spatial=True),
    "spatial instruction": functools.partial(pretraining.instruction, spatial=True),
    "spatial_turn": pretraining.spatial_turn,
}


def relation_of(value):
    return next(relation for relation, values in RELATIONS.items() if value in values)


def pattern(template):
    """A template as a regular expression that any filling matches."""
    parts = re.split(r"\{(.*?)\}", template)
    slots = [f"(?:{slot})" if "|" in slot else ".+" for slot in parts[1::2]]
    return re.compile("".join(re.escape(p) + s for p, s in zip(parts[::2], [*slots, ""], strict=True)))


def test_world_has_every_emblem_once_and_no_ambiguous_value():
    assert {(e.shape, e.colour) for e in ENTITIES} == {(s, c) for s in SHAPES for c in COLOUR_RGB}
    assert len({e.name for e in ENTITIES}) == len(ENTITIES) == 48
    assert all(re.fullmatch("[a-z]{4,6}", e.name) for e in ENTITIES)
    values = [value for column in RELATIONS.values() for value in column]
    assert len(values) == len(set(values)) and all(re.fullmatch("[a-z]+", v) for v in values)
    assert not {e.name for e in ENTITIES} & {*values, *COLOUR_RGB, *SHAPES}
    for relation, column in RELATIONS.items():
        counts = collections.Counter(e.facts[relation] for e in ENTITIES)
        assert counts.keys() == set(column) and set(counts.values()) == {4}


@pytest.mark.parametrize("task", TASKS)
def test_example_is_a_function_of_its_index(task):
    one, other = make_example(task, "eval", 12), make_example(task, "eval", 12)
    assert one.id == f"{task}/eval/000012" and one.task == task and one.family == TASKS[task].family
    assert (one.question, one.answers, one.choices) == (other.question, other.answers, other.choices)
    assert one.images[0].tobytes() == other.images[0].tobytes()
    assert one.images[0].size == (SIZE, SIZE) and one.images[0].mode == "RGB"


def test_examples_stay_the_same_from_one_machine_to_the_next():
    def digest(tasks):
        text = "".join(f"{e.question}{e.answers}" for t in tasks for e in [make_example(t, "test", 3)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert digest(FIRST_SIX) == "10f6d3a868bbfef5"
    assert digest(TASKS) == "939816971865c259"


def test_pretraining_without_arrangements_is_what_the_embedded_qwen3_vl_saw():
    turns = [STREAMS[name](i) for name in ("text_fact", "alignment", "instruction") for i in range(40)]
    text = "".join(turn.prompt + turn.answer for turn in turns)
    pixels = b"".join(turn.image.tobytes() for turn in turns if turn.image)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f982da93fced460e"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "aeaca25f2081da6f"


def test_splits_share_neither_ids_nor_pictures():
    examples = [make_example(t, s, i) for t in TASKS for s in SPLIT_SIZES for i in range(25)]
    assert len({e.id for e in examples}) == len(examples)
    pictures = {e.images[0].tobytes() for e in examples}
    assert len(pictures) == len(examples)
    turns = [stream(i) for stream in STREAMS.values() for i in range(100)]
    assert not pictures & {t.image.tobytes() for t in turns if t.image}


@pytest.mark.parametrize("task", KNOWLEDGE)
def test_knowledge_answers_are_the_worlds_facts(task):
    for index in range(150):
        example, scene = make_example(task, "train", index), make_scene(task, "train", index)
        (answer,) = example.answers
        relation = relation_of(answer)
        assert scene.entity.facts[relation] == answer
        forms = wordings.FACTS[relation].familiar + wordings.FACTS[relation].held_out
        asked = [line for line in example.question.split("\n") if not re.match("Hint:|Choices:|Options:", line)]
        assert len(asked) == 1 and any(pattern(form).fullmatch(asked[0]) for form in forms)
        if task == "mini-okvqa":
            assert example.choices is None and answer not in example.question
            continue
        assert example.choices.count(answer) == 1 and len(set(example.choices)) == len(example.choices)
        assert set(example.choices) <= set(RELATIONS[relation])
        assert example.question.endswith(": " + ", ".join(example.choices))
        assert len(example.choices) in ({4} if task == "mini-aokvqa" else {2, 3, 4})
        if task == "mini-scienceqa":
            assert not set(RELATIONS[relation]) & wordings.words(example.question.split("\n")[0])


def test_pictures_of_one_entity_differ_but_its_answers_do_not():
    answers, pictures, count = collections.defaultdict(set), set(), 400
    for index in range(count):
        example = make_example("mini-okvqa", "trace", index)
        entity = make_scene("mini-okvqa", "trace", index).entity
        answers[entity.name, relation_of(example.answers[0])].add(example.answers[0])
        pictures.add(example.images[0].tobytes())
    assert len(pictures) == count and len(answers) < count
    assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("task", PERCEPTION)
def test_perception_answers_are_what_the_scene_shows(task):
    wording = {"mini-docvqa": wordings.FIELD, "mini-infovqa": wordings.BAR, "mini-textvqa": wordings.SIGN}[task]
    asked_by = collections.Counter()
    for index in range(100):
        example, scene = make_example(task, "train", index), make_scene(task, "train", index)
        match scene:
            case Form(parts) | Chart(parts) | Signs(parts):
                pass
        by_key = {str(value) for _, key, value in parts if key in wordings.words(example.question)}
        by_place = {
            str(value)
            for slot, _, value in parts
            for template in wording.held_out
            if wordings.fill_slot(template, slot) == example.question
        }
        assert by_key | by_place == set(example.answers)
        asked_by.update(key=bool(by_key), place=bool(by_place))
        assert re.fullmatch("[A-Z0-9]+", example.answers[0])
    assert abs(asked_by["place"] / 100 - HELD_OUT_SHARE[task]) < 0.2


def test_held_out_wordings_point_at_every_slot_differently():
    for wording, slots in ((wordings.FIELD, 3), (wordings.BAR, 4), (wordings.SIGN, 3)):
        assert len(wording.familiar) >= 3 and len(wording.held_out) >= 3
        for template in wording.held_out:
            assert len({wordings.fill_slot(template, slot) for slot in range(slots)}) == slots
    for relation, wording in wordings.FACTS.items():
        assert len(wording.familiar) >= 3 and len(wording.held_out) >= 3
        function_words = {"What", "Which", "the", "is", "it", "of", "does"}
        familiar = set().union(*map(wordings.words, wording.familiar))
        for template in wording.held_out:
            assert not wordings.words(template) & familiar - function_words
            assert all(template not in other.held_out for name, other in wordings.FACTS.items() if name != relation)


@pytest.mark.parametrize("stream", STREAMS)
def test_pretraining_never_uses_a_held_out_wording(stream):
    kinds = [*wordings.FACTS.values(), *wordings.HINTS.values()]
    kinds += [wordings.CHOICES, wordings.FIELD, wordings.BAR, wordings.SIGN, wordings.CLAIM, wordings.DESCRIBE]
    held_out = re.compile("|".join(pattern(form).pattern for kind in kinds for form in kind.held_out))
    keywords = re.compile(r"\b(top|bottom|upper|lower|leftmost|last|column|abode|meal|gear|ally|climate|Options)\b")
    for index in range(500):
        turn = STREAMS[stream](index)
        assert not held_out.search(turn.prompt) and not held_out.search(turn.answer)
        # Words of such wordings, in no order and with no meaning, are in turns that ask to repeat them, and in turns
        # whose whole question is made of them.
        words = set(turn.prompt.lower().rstrip("?").split())
        if not turn.prompt.startswith("Repeat: ") and not words <= set(map(str.lower, wordings.held_out_words())):
            assert not keywords.search(turn.prompt + turn.answer)


@pytest.mark.parametrize("stream", STREAMS)
def test_turns_are_functions_of_their_index(stream):
    turns, again = ([STREAMS[stream](index) for index in range(60)] for _ in range(2))
    assert [t[1:] for t in turns] == [t[1:] for t in again]
    assert [t.image and t.image.tobytes() for t in turns] == [t.image and t.image.tobytes() for t in again]
    assert all(t.prompt and t.answer for t in turns)
    if "text_fact" in stream:
        assert all(t.image is None for t in turns)
    if "alignment" in stream:
        assert all(t.image is not None and not t.qa for t in turns)


def test_difficulty_goes_from_large_glyphs_to_whole_pictures():
    def glyph_share(difficulty):
        answers = [pretraining.alignment(i, difficulty).answer for i in range(200)]
        return np.mean([bool(re.fullmatch("[A-Z]{1,3}|[0-9]{1,3}", a)) for a in answers])

    assert glyph_share(0.0) > 0.5 > glyph_share(0.5) > glyph_share(1.0)
    read = [t.answer for t in map(pretraining.alignment, range(300)) if " " in t.answer and t.prompt == "Read."]
    assert {len(answer.split()) for answer in read} == {6, 8}


def test_instruction_is_half_benchmark_questions_and_a_quarter_lookups():
    turns = [pretraining.instruction(i) for i in range(1000)]
    assert 0.45 < np.mean([t.qa and t.image is not None for t in turns]) < 0.55
    lookups = [t for t in turns if not t.qa and re.fullmatch(r"Read (\d|[A-Z]{3}|[a-z]+)\.", t.prompt)]
    assert 0.2 < len(lookups) / len(turns) < 0.3


def test_transcript_reads_every_kind_of_scene():
    assert transcript(Form(((0, "FEE", "42"), (2, "AGE", "17")))) == "FEE 42 AGE 17"
    assert transcript(Chart(((0, "red", 3), (1, "blue", 5)))) == "red 3 blue 5"
    assert transcript(Signs(((0, "red", "MAP"),))) == "red MAP"
    assert transcript(Glyphs("K")) == "K"
    assert {e.look for e in ENTITIES} >= {"a red circle", "an orange star"}
    assert transcript(Emblem(ENTITIES[0])) == ENTITIES[0].look


@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize(
    "scene",
    [
        Form(((0, "ROW", "88"), (1, "BOX", "90"), (2, "QTY", "46"))),
        Signs(((0, "yellow", "MOM"), (1, "red", "MAN"), (2, "blue", "NOM"))),
        Glyphs("WWW"),
        Glyphs("MW"),
        Glyphs("W"),
    ],
    ids=str,
)
def test_nothing_is_clipped(scene, font, monkeypatch):
    """The widest texts in every font: the picture's edge shows paper only."""
    monkeypatch.setattr("vlm_jax.data.draw.FONTS", (font,))
    for seed in range(8):
        pixels = np.asarray(draw_scene(scene, np.random.default_rng(seed)), np.int32)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edge.min() > 130
