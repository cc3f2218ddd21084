"""A prompt of one's own, a bare prompt without the chat template, and the subject of a question."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.checkpoints.sources import MINI, read_config
from vlm_jax.data import Example, load_task
from vlm_jax.data.options import DataOptions, read_prompt
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.prompts import P0_PROMPT, encode, prompt_of, room_of

FACT = Example("a", (), "The capital of France is", ("Paris",), subject="France")
BARE = dataclasses.replace(FACT, prompt="{QUESTION}", chat_template=False)


@pytest.fixture(scope="module", params=("mini-qwen3-vl", "mini-gemma3", "mini-llava"))
def model(request):
    """Config and processor."""
    config = read_config(MINI / request.param)
    return config, FAMILIES[config.family].load_processor(MINI / request.param)


def encoded(model, example, **options):
    config, processor = model
    batch = encode([example], processor, config, **options)
    real = np.asarray(batch.inputs.attention_mask[0])
    return np.asarray(batch.inputs.input_ids[0])[real], {name: span[0][real] for name, span in batch.spans.items()}


def test_a_bare_prompt_is_the_text_and_nothing_else(model):
    tokenizer = model[1].tokenizer
    ids, spans = encoded(model, BARE)
    want = tokenizer("The capital of France is Paris" + tokenizer.eos_token)["input_ids"]
    np.testing.assert_array_equal(ids, want)
    assert tokenizer.decode(ids[spans["question"]]).strip() == "The capital of France is"
    assert tokenizer.decode(ids[spans["answer"]]).strip() == "Paris"
    assert tokenizer.decode(ids[spans["end"]]) == tokenizer.eos_token
    assert len(encoded(model, dataclasses.replace(FACT, prompt="{QUESTION}"))[0]) > len(ids)


def test_images_of_a_bare_prompt_have_their_tokens(model):
    processor = model[1]
    picture = Image.new("RGB", (64, 64), "red")
    marked = dataclasses.replace(
        BARE, images=(picture,), question="Is <image> the flag of France? No,", answers=("it",)
    )
    ids, spans = encoded(model, marked)
    in_template, in_turn = encoded(model, dataclasses.replace(marked, chat_template=True))
    assert spans["image"].sum() == in_turn["image"].sum() > 0
    np.testing.assert_array_equal(ids[spans["image"]], in_template[in_turn["image"]])
    before = processor.tokenizer.decode(ids[: spans["image"].argmax()], skip_special_tokens=True)
    assert before.strip() == "Is"
    assert "France" in processor.tokenizer.decode(ids[spans["subject"]])  # Gemma's tokeniser joins it with the mark
    assert 0 < spans["subject"].sum() < spans["question"].sum()


def test_a_prompt_of_the_example_is_used_everywhere(model):
    mine = dataclasses.replace(FACT, prompt="Say it. {QUESTION} ... ")
    np.testing.assert_array_equal(encoded(model, mine)[0], encoded(model, FACT, prompt=mine.prompt)[0])
    assert not np.array_equal(encoded(model, mine)[0], encoded(model, FACT)[0])
    np.testing.assert_array_equal(encoded(model, FACT)[0], encoded(model, FACT, prompt=P0_PROMPT)[0])
    config, processor = model
    long = dataclasses.replace(FACT, prompt="word " * 200 + "{QUESTION}")
    assert room_of([long], processor, config).length > len(encoded(model, FACT)[0]) + 100
    assert (prompt_of(FACT), prompt_of(long)) == (P0_PROMPT, long.prompt)


def test_the_subject_is_where_the_question_has_it(model):
    _, processor = model
    for example in (FACT, BARE, dataclasses.replace(FACT, prompt="France! {QUESTION} (France)")):
        ids, spans = encoded(model, example)
        assert processor.tokenizer.decode(ids[spans["subject"]]).strip() == "France"
        assert not (spans["subject"] & ~spans["question"]).any()
    ids, spans = encoded(model, dataclasses.replace(FACT, subject=None))
    np.testing.assert_array_equal(spans["subject"], spans["question"])


@pytest.mark.parametrize("subject, times", [("Spain", 0), ("a", 3), (" ", 0)])
def test_a_subject_that_is_not_found(model, subject, times):
    with pytest.raises(UserError, match=f"example 'a': its question has the subject {subject!r} {times} times"):
        encoded(model, dataclasses.replace(FACT, subject=subject))


# Options and files


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "facts.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    return write


LINE = {"id": "1", "image": [], "question": "The capital of France is", "answers": "Paris"}


def test_options_reach_the_examples(file, tmp_path):
    path = file(LINE, LINE | {"id": "2", "family": "perception", "subject": "France"})
    (tmp_path / "prompt.txt").write_text("Q: {QUESTION}\nA:\n")
    for prompt, want in (
        ("Complete: {QUESTION}", "Complete: {QUESTION}"),
        (tmp_path / "prompt.txt", "Q: {QUESTION}\nA:"),
    ):
        options = DataOptions(prompt=str(prompt), chat_template=False, family="knowledge")
        one, two = load_task(path, options=options)
        assert (one.prompt, one.chat_template, one.family, one.subject) == (want, False, "knowledge", None)
        assert (two.prompt, two.chat_template, two.family, two.subject) == (want, False, "perception", "France")
    (plain, _) = load_task(path)
    assert (plain.prompt, plain.chat_template, plain.family) == (None, True, None)
    (mini,) = load_task("mini-docvqa", limit=1, options=DataOptions(prompt="{QUESTION}", family="knowledge"))
    assert (mini.prompt, mini.family) == ("{QUESTION}", "perception")


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("Answer:", "is no file and has no {QUESTION}: put {QUESTION}"),
        ("x" * 5000, "is no file and has no"),
        ("{QUESTION} {QUESTION}", "has {QUESTION} 2 times: write it once"),
    ],
)
def test_wrong_prompts(file, prompt, says):
    with pytest.raises(UserError, match=says.replace("{", r"\{").replace("}", r"\}")):
        load_task(file(LINE), options=DataOptions(prompt=prompt))


def test_a_prompt_file_without_a_place(tmp_path):
    (tmp_path / "p").write_text("Answer:")
    with pytest.raises(UserError, match=r"has \{QUESTION\} 0 times"):
        read_prompt(str(tmp_path / "p"))


@pytest.mark.parametrize(
    "subject, says", [("Spain", "'Spain' 0 times"), ("a", "'a' 3 times"), (7, "'subject' must be")]
)
def test_wrong_subjects_are_named_with_their_line(file, subject, says):
    with pytest.raises(UserError, match=f"line 2.*{says}"):
        load_task(file(LINE, LINE | {"id": "2", "subject": subject}))
