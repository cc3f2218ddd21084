"""Text in, text out: answers, the tokens of a prompt, and prompts that hold their answers."""

import dataclasses

import numpy as np
import pytest
from kind_cases import one_sentence

import vlm_jax
from eval.evaluation import answer
from interventions import Add, AttentionKnockout, ask, generate_variants, tokens_of
from vlm_jax.data import load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import batches, encode


@pytest.fixture(scope="module", params=["mini-qwen3-vl", "mini-gemma3", "mini-llava"])
def mini(request):
    return vlm_jax.load(request.param)


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-docvqa", split="trace", limit=3)


def test_ask_is_what_the_evaluation_generates(mini, examples, tmp_path):
    """One by one instead of in a batch, from a picture or its file, with and without a knock-out of a token group."""
    blind = AttentionKnockout.between(mini[0].config.text.num_hidden_layers, "text", "image")
    for interventions in ((), (blind,)):
        want = answer(*mini, examples, interventions).texts
        found = [ask(*mini, one.images[0], one.question, interventions, max_new_tokens=12) for one in examples]
        assert found == want
    examples[0].images[0].save(tmp_path / "a.png")
    assert ask(*mini, tmp_path / "a.png", examples[0].question, blind, max_new_tokens=12) == want[0]
    assert want != answer(*mini, examples).texts


def test_ask_without_a_picture(mini):
    model, processor = mini
    question = load_task("mini-docvqa", split="trace", limit=1)[0].question
    assert isinstance(ask(model, processor, None, question, max_new_tokens=2), str)
    assert isinstance(ask(model, processor, None, question, prompt="{QUESTION}", max_new_tokens=2), str)


def test_ask_refuses(mini, tmp_path):
    model, processor = mini
    (tmp_path / "no.png").write_text("no picture")
    for wrong in (tmp_path / "no.png", tmp_path / "missing.png"):
        with pytest.raises(UserError, match="is no picture that can be read") as refusal:
            ask(model, processor, wrong, "What?")
        assert one_sentence(refusal.value)
    with pytest.raises(UserError, match="the model has no layer 99"):
        ask(model, processor, None, "What?", Add.steer(np.ones(model.config.text.hidden_size), layer=99))


def test_tokens_of_a_prompt(mini, examples):
    """Every token that is no padding, once, in order; runs of visual tokens are one entry."""
    model, processor = mini
    batch = encode(examples, processor, model.config)
    mask, ids = np.asarray(batch.inputs.attention_mask), np.asarray(batch.inputs.input_ids)
    for row, example in enumerate(examples):
        tokens = tokens_of(batch, row, processor)
        places = [place for token in tokens for place in range(token.start, token.start + token.count)]
        np.testing.assert_array_equal(places, np.flatnonzero(mask[row]))
        images = [token for token in tokens if token.group == "image"]
        assert len(images) == 1 and images[0].count == batch.spans["image"][row].sum()
        question = "".join(token.text for token in tokens if token.group in ("question", "last"))
        assert example.question.split()[1] in question
        assert tokens[0].text == processor.tokenizer.decode([int(ids[row][places[0]])])
        lines = repr(tokens).splitlines()
        assert len(lines) == len(tokens) < 200 and f"{images[0].start}-" in repr(tokens)
    with pytest.raises(UserError, match="no row 3: name one of 0 to 2"):
        tokens_of(batch, 3, processor)


def test_answered_prompts_generate_nothing(mini, examples):
    """Instead of padding or a second answer behind the first."""
    model, processor = mini
    answered = encode(examples, processor, model.config)
    cut = Add.steer(np.ones(model.config.text.hidden_size), layer=1)
    for generate in (
        lambda: vlm_jax.generate(model, answered.inputs, 2),
        lambda: generate_variants(model, answered.inputs, [cut], 2),
    ):
        with pytest.raises(UserError, match="encode them with with_answer=False") as refusal:
            generate()
        assert one_sentence(refusal.value)
    assert not encode(examples, processor, model.config, with_answer=False).inputs.answered
    for _, batch in batches(examples, processor, model.config, 2):
        assert batch.inputs.answered


def test_two_pictures_are_two_entries(mini, examples):
    model, processor = mini
    both = dataclasses.replace(examples[0], images=[examples[0].images[0], examples[1].images[0]])
    batch = encode([both], processor, model.config)
    images = [token for token in tokens_of(batch, 0, processor) if token.group == "image"]
    assert len(images) == 2 and sum(token.count for token in images) == batch.spans["image"].sum()
