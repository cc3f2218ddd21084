"""Prompts are, token for token, what transformers makes of the chat template with the question itself. The spans are
where the question is."""

import copy
import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from vlm_jax import rendering
from vlm_jax.checkpoints.sources import MINI, read_config
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.families import BACKBONES, FAMILIES, backbone_config
from vlm_jax.families.base import TextProcessor
from vlm_jax.prompts import P0_PROMPT, PLAIN_PROMPT, encode
from vlm_jax.time_limit import time_limit

MODELS = ("mini-qwen3-vl", "mini-gemma3", "mini-llava")
#: LLaVA-1.5's published template: images come first, wherever the message has them.
IMAGES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPACED = ("What is it?", " What is it?", "What is it? ", "\n What\tis  it?\n\n", "  ", "x")
PROMPTS = (PLAIN_PROMPT, P0_PROMPT, " {QUESTION}", "{QUESTION}\nBriefly. ", "\n{QUESTION}\n")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """Config and processor."""
    config = read_config(MINI / request.param)
    return config, FAMILIES[config.family].load_processor(MINI / request.param)


@pytest.fixture(scope="module")
def gemma():
    return read_config(MINI / "mini-gemma3"), FAMILIES["gemma3"].load_processor(MINI / "mini-gemma3")


def picture(grey=100):
    return Image.new("RGB", (64, 64), (grey, grey, grey))


def example(question, images=1, answer="red"):
    return Example("a", tuple(picture(40 * i) for i in range(images)), question, (answer,))


def tokens(model, asked, prompt=PLAIN_PROMPT, with_answer=False):
    config, processor = model
    batch = encode([asked], processor, config, prompt=prompt, with_answer=with_answer)
    return batch.inputs.input_ids[0][batch.inputs.attention_mask[0]]


def spanned(model, asked, name="question", prompt=PLAIN_PROMPT):
    config, processor = model
    batch = encode([asked], processor, config, prompt=prompt)
    return processor.tokenizer.decode(np.asarray(batch.inputs.input_ids[0])[batch.spans[name][0]])


def with_template(model, template):
    config, processor = model
    processor = copy.deepcopy(processor)
    processor.chat_template = processor.tokenizer.chat_template = template
    return config, processor


def of_transformers(model, content, images):
    """What transformers' processor makes of a message."""
    _, processor = model
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.removeprefix(processor.tokenizer.bos_token or "")  # the tokeniser writes one itself
    if images:
        return processor(text=[text], images=[list(images)], return_tensors="np")["input_ids"][0]
    return processor.tokenizer(text)["input_ids"]


# White space and changes of the text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tokens_are_those_of_the_rendered_template(model, count):
    for question in SPACED:
        for prompt in PROMPTS:
            asked = example(question, count)
            text = {"type": "text", "text": prompt.replace("{QUESTION}", question)}
            want = of_transformers(model, [*[{"type": "image"}] * count, text], asked.images)
            np.testing.assert_array_equal(tokens(model, asked, prompt), want, err_msg=repr((question, prompt)))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_text_only_models(name):
    processor = TextProcessor(FAMILIES[read_config(MINI / name).family].load_processor(MINI / name).tokenizer)
    config = backbone_config(read_config(MINI / name))
    assert config.family in BACKBONES.values()
    for question in SPACED:
        for prompt in PROMPTS:
            turns = [{"role": "user", "content": prompt.replace("{QUESTION}", question)}]
            want = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            want = processor.tokenizer(want.removeprefix(processor.tokenizer.bos_token or ""))["input_ids"]
            np.testing.assert_array_equal(tokens((config, processor), example(question, 0), prompt), want)


#: As published: Llama 3's, which trims, Llama 2's, which calls Python's strip, and one with a system prompt.
TEXT_TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% endfor %}",
    "system": "{% if messages[0].role != 'system' %}{{ 'SYSTEM: You help.\n' }}{% endif %}{% for m in messages %}"
    "{{ m.role | upper }}: {{ m.content.rstrip() }}\n{% endfor %}ASSISTANT:",
}


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_published_templates_of_text_only_models(name):
    vision = read_config(MINI / "mini-llava")
    processor = copy.deepcopy(FAMILIES["llava"].load_processor(MINI / "mini-llava"))
    processor.tokenizer.chat_template = TEXT_TEMPLATES[name]
    model = backbone_config(vision), TextProcessor(processor.tokenizer)
    for question in SPACED:
        for prompt in PROMPTS:
            turns = [{"role": "user", "content": prompt.replace("{QUESTION}", question)}]
            want = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            want = processor.tokenizer(want, add_special_tokens=name == "system")["input_ids"]
            np.testing.assert_array_equal(tokens(model, example(question, 0), prompt), want)
            assert spanned(model, example(question, 0), prompt=prompt).strip() == question.strip()


def test_the_question_is_where_the_template_shows_it(model):
    trims = model[0].family == "gemma3"
    for question in ("What is it?", " What is it?", "What is it?\n\n"):
        got = spanned(model, example(question))
        # Sentencepiece's decoding drops a first space.
        assert got.lstrip() == (question.strip() if trims else question.lstrip())
        assert spanned(model, example(question), prompt=P0_PROMPT).strip() == question.strip()
    padded, bare = (tokens(model, example(question)) for question in (" What is it?  ", "What is it?"))
    assert np.array_equal(padded, bare) == trims


@pytest.mark.parametrize(
    "old, new",
    [("part.text | trim", "part.text | upper"), ("part.text | trim", "part.text | replace('is', 'was')")],
)
def test_a_template_that_changes_the_question(gemma, old, new):
    template = gemma[1].chat_template
    assert old in template
    changed = with_template(gemma, template.replace(old, new))
    with pytest.raises(UserError, match="changes the text of example 'a'"):
        tokens(changed, example("What is it?"))
    # A question that the template leaves as it is
    assert spanned(changed, example("WHAT?")).strip() == "WHAT?"


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show each text of a message once"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{{ p.text }}{% endfor %}{% endfor %}", "once"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}", "cannot show a question"),
        ("{% for m in messages %}", "cannot show a question"),
    ],
)
def test_a_template_that_cannot_show_a_question(gemma, template, says):
    with pytest.raises(UserError, match=says):
        tokens(with_template(gemma, template), example("What?", 0))


def test_a_template_without_end_or_measure(gemma, monkeypatch):
    monkeypatch.setattr(rendering, "_SECONDS", 0.2)
    monkeypatch.setattr(rendering, "_LONGEST", 1000)
    count = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for template, says in ((count, "did not end within 0.2 s"), ("{{ 'x' * 1001 }}", "writes 1,001 characters")):
        with pytest.raises(UserError, match=says):
            tokens(with_template(gemma, template), example("What?", 0))
    assert len(tokens(gemma, example("What?", 0)))  # the limit ends with the template
    time.sleep(0.3)


@pytest.mark.parametrize("template", ["{{ 9**99999999 }}", "{{ 'x' * 100000000000 }}", "{% set n = 2**9 %}"])
def test_a_template_that_no_limit_of_time_would_end(gemma, template):
    with pytest.raises(UserError, match="line 1 computes with"):
        tokens(with_template(gemma, template), example("What?", 0))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"question": None}, "its question is 'None', not a text"),
        ({"question": "a\ud800"}, "its question holds half of a surrogate pair"),
        ({"answers": ("a\ud800",)}, "its answer holds half of a surrogate pair"),
        ({"answers": ()}, "has no answer"),
    ],
)
def test_texts_that_a_program_gives(gemma, fields, says):
    with pytest.raises(UserError, match=f"example 'a'.*{says}"):
        tokens(gemma, dataclasses.replace(example("What?", 0), **fields))


def test_a_template_with_stars_that_are_no_powers(gemma):
    stars = "{% macro f(x) %}{{ kwargs }}{% endmacro %}{{ f(1, **{}) }}{# ** #}**bold** {{ 1234567890 }}"
    assert len(tokens(with_template(gemma, stars + gemma[1].chat_template), example("What?", 0)))


def test_limits_of_time_may_be_nested():
    with pytest.raises(TimeoutError, match=r"within 0.2 s"), time_limit(0.2):
        with time_limit(0.1):
            pass
        while True:
            pass


def test_a_machine_that_is_busy_does_not_shorten_a_limit():
    """Only the time in which the code runs counts."""
    with time_limit(0.2):
        time.sleep(0.5)
    with pytest.raises(TimeoutError, match=r"within 0.1 s"), time_limit(0.1), time_limit(0.4):
        time.sleep(0.2)
        while True:
            pass


def test_white_space_around_an_answer(model):
    want = tokens(model, example("What is it?", answer="red"), with_answer=True)
    np.testing.assert_array_equal(tokens(model, example("What is it?", answer=" red\n"), with_answer=True), want)


def test_a_question_without_its_images_has_no_marks(model):
    blind = example("Is <image> larger?\n<image>", 2).without_images()
    np.testing.assert_array_equal(tokens(model, blind), tokens(model, example("Is  larger?", 0)))


def test_a_template_with_words_of_its_own(gemma):
    template = gemma[1].chat_template.replace("{{ part.text | trim }}", "Q:{{ part.text | trim }}.")
    changed = with_template(gemma, template)
    assert spanned(changed, example(" What is it?")).strip() == "What is it?"
    assert "Q:What is it?." in changed[1].tokenizer.decode(tokens(changed, example(" What is it?")))


def test_one_rendering_for_each_example(gemma, monkeypatch):
    config, processor = gemma
    calls = []
    render = type(processor).apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda *args, **kw: calls.append(1) or render(*args, **kw)
    )
    encode([example(f"What is {i}?") for i in range(20)], processor, config)
    assert len(calls) == 21


@pytest.mark.parametrize("prompt", ["Describe.", "{QUESTION} {QUESTION}", ""])
def test_a_prompt_without_one_place_for_the_question(gemma, prompt):
    with pytest.raises(UserError, match=r"must have \{QUESTION\} once"):
        tokens(gemma, example("What?"), prompt)


# Marks of images


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "<image>What is it?", " <image> \n What is it?"])
def test_a_leading_mark_is_where_the_image_is_anyway(model, question):
    for prompt in (PLAIN_PROMPT, P0_PROMPT):
        np.testing.assert_array_equal(
            tokens(model, example(question), prompt, True), tokens(model, example("What is it?"), prompt, True)
        )
    assert spanned(model, example(question)).strip() == "What is it?"


@pytest.mark.parametrize(
    "question, parts",
    [
        ("Is <image> red?", ["Is ", None, " red?"]),
        ("What is it?\n<image>", ["What is it?\n", None]),
        ("Is <image> as large as <image>?", ["Is ", None, " as large as ", None, "?"]),
        ("<image>\nIs it as large as <image>?", [None, "Is it as large as ", None, "?"]),
        ("<image><image>\nWhich is larger?", [None, None, "Which is larger?"]),
    ],
)
def test_marks_are_the_places_of_the_images(model, question, parts):
    asked = example(question, parts.count(None))
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    np.testing.assert_array_equal(tokens(model, asked), of_transformers(model, content, asked.images))
    got = "".join(spanned(model, asked).split())
    assert got == "".join("".join(part for part in parts if part).split())
    config, processor = model
    batch = encode([asked], processor, config)
    assert (
        batch.spans["image"].sum() == parts.count(None) * encode([example("x")], processor, config).spans["image"].sum()
    )
    if FAMILIES[config.family].chat.image_end is not None:
        assert batch.spans["image_end"].sum() == parts.count(None)
    assert not (batch.spans["image"] & batch.spans["question"]).any()


def test_images_of_a_template_that_shows_them_first():
    config = read_config(MINI / "mini-llava")
    model = with_template((config, FAMILIES["llava"].load_processor(MINI / "mini-llava")), IMAGES_FIRST)
    asked = example("Is <image> red?")
    content = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]
    np.testing.assert_array_equal(tokens(model, asked), of_transformers(model, content, asked.images))
    assert spanned(model, asked).split() == ["Is", "red?"]


@pytest.mark.parametrize(
    "question, images", [("<image>\nWhat?", 2), ("<image> or <image>?", 1), ("Is <image> red?", 0)]
)
def test_marks_that_do_not_fit_the_images(model, question, images):
    with pytest.raises(UserError, match=rf"'a' marks \d place\(s\) with <image> but has {images} image"):
        tokens(model, example(question, images))


def test_a_mark_in_an_answer_or_another_special_token(model):
    with pytest.raises(UserError, match="special token '<image>'"):
        tokens(model, example("What?", answer="<image>"))
    chat = FAMILIES[model[0].family].chat
    if chat.image != "<image>":
        with pytest.raises(UserError, match="special token"):
            tokens(model, example(f"What is {chat.image}?"))
