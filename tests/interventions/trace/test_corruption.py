"""Corruptions against prompts that were really changed, NumPy's statistics, and random numbers drawn by hand."""

import dataclasses
import itertools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ImageFilter
from tracing_oracle import changed, forward, probability

import vlm_jax
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.trace.corruption import CORRUPTIONS, Corrupter, Survey, counterpart, normal, sample_key, survey
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_batch
from vlm_jax.data import Example, load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch, batches, encode

TOLERANCE = 1e-5
VISUAL = ("image_noise", "mean_image", "swapped_image", "blurred_image")
QUESTION = ("question_noise", "swapped_question")


class Task(NamedTuple):
    model: vlm_jax.Model
    processor: object
    examples: list[Example]
    rows: list[int]
    batch: Batch
    survey: Survey

    def corrupter(self, corruption: str, **options) -> Corrupter:
        options = TraceOptions(corruption=corruption, **options)
        return Corrupter(self.model, self.processor, self.examples, self.survey, options)

    def corrupted(self, corruption: str, replicate: int = 0, **options) -> tuple:
        return self.corrupter(corruption, **options)(self.rows, self.batch, replicate)


def make_task(name: str, numbers) -> Task:
    """Some examples of mini-docvqa in one batch."""
    model, processor = vlm_jax.load(name)
    loaded = load_task("mini-docvqa", split="trace", limit=max(numbers) + 1)
    examples = [loaded[number] for number in numbers]
    groups = list(batches(examples, processor, model.config, len(examples), align=PREFIX_BUCKET))
    assert len(groups) == 1
    return Task(model, processor, examples, *groups[0], survey(model, groups))


@pytest.fixture(scope="module")
def task():
    return make_task("mini-qwen3-vl", [1, 2, 3, 4, 6, 7])


@pytest.fixture(scope="module")
def taps(task):
    """A forward pass's embeddings ``(B, T, D)`` and what DeepStack adds ``(K, B, T, D)``."""
    sites = ("text.embeddings", "text.deepstack")
    found = jax.jit(lambda model, inputs: model(inputs, taps=sites).taps)(task.model, task.batch.inputs)
    embeddings, deepstack = (np.asarray(found[site]) for site in sites)
    assert not deepstack[2:].any()
    return embeddings, deepstack[:2]


def near(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


# Chance


def test_normal_is_drawn_token_by_token():
    keys = jnp.stack([sample_key(3, name, 1) for name in ("a", "b")])
    for stream in (0, 2):
        drawn = normal(keys, 3, 5, stream)
        for row, name in enumerate(("a", "b")):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), zlib.crc32(name.encode())), 1)
            for place in range(3):
                mine = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), place), (5,))
                np.testing.assert_array_equal(drawn[row, place], mine)
    assert not np.isin(normal(keys, 3, 5, 0), normal(keys, 3, 5, 2)).any()
    np.testing.assert_array_equal(normal(keys, 2, 5), normal(keys, 3, 5)[:, :2])  # whatever the padding


def test_question_noise_by_hand(task, taps):
    """Equation 5, number for number: x + s * sigma_E * N(0, 1) at the question's tokens and nothing elsewhere."""
    (added,) = task.corrupted("question_noise", replicate=2, noise_scale=1.5, seed=4)
    question, (length, width) = task.batch.spans["question"], taps[0].shape[1:]
    scale = 1.5 * task.survey.sigma["sequence"]
    for row, example in enumerate(task.examples):
        noise = normal(sample_key(4, example.id, 2)[None], length, width)[0]
        noisy = taps[0][row] + np.asarray(scale * noise)
        want = np.where(question[row][:, None], noisy, taps[0][row]) - taps[0][row]
        np.testing.assert_allclose(added.value[row], want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal((np.asarray(added.value) != 0).any(-1), question)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_noise_has_the_standard_deviation_that_is_asked_for(task, scale):
    (added,) = task.corrupted("question_noise", noise_scale=scale)
    drawn = np.asarray(added.value)[task.batch.spans["question"]]
    assert drawn.std() == pytest.approx(scale * task.survey.sigma["sequence"], rel=0.03)
    assert abs(drawn.mean()) < 0.05 * drawn.std()


def padded(task: Task, rows, length: int) -> Batch:
    """The batch of other rows in another order, with more padding."""
    return encode([task.examples[row] for row in rows], task.processor, task.model.config, step=length)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_neighbours_order_and_padding_do_not_matter(task, corruption):
    """Noise on embeddings that are looked up is the same bit for bit; images come out of the tower's products."""
    whole, rows = task.corrupted(corruption, seed=1), [4, 1, 2]
    some = task.corrupter(corruption, seed=1)(rows, padded(task, rows, 96))
    assert len(some) == len(whole) == (2 if corruption in VISUAL else 1)
    for few, many in zip(some, whole, strict=True):
        few, many = (np.asarray(a.value).reshape(-1, *a.value.shape[-3:]) for a in (few, many))
        compare = np.testing.assert_array_equal if corruption in QUESTION else near
        compare(few[:, :, : many.shape[2]], many[:, rows])
        assert not few[:, :, many.shape[2] :].any()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_seeds_and_replicates_differ_where_there_is_chance(task, corruption):
    first, other, again = (
        np.asarray(task.corrupted(corruption, replicate, seed=seed)[0].value)
        for replicate, seed in ((0, 0), (1, 0), (0, 1))
    )
    random = CORRUPTIONS[corruption].random
    assert (first == other).all() == (first == again).all() == (not random)
    # Seeds and replicates are not one number: 0, 1 is not 1, 0.
    assert random == (other != again).any()


# What is measured on the task


def test_sigma_and_means_are_numpys(task, taps):
    """Batches that are filled up with repeats, too; padding does not enter (a control has it in)."""
    embeddings, deepstack = (a.astype(np.float64) for a in taps)
    real, spans = np.asarray(task.batch.inputs.attention_mask), task.batch.spans
    want = {
        "sequence": embeddings[real].std(),
        "question": embeddings[spans["question"]].std(),
        "vocabulary": np.asarray(task.model.text.embed_tokens.weight[...], np.float64).std(),
    }
    assert not real.all() and want["sequence"] != pytest.approx(embeddings.std(), rel=1e-3)
    assert len({round(sigma, 3) for sigma in want.values()}) == 3
    filled = survey(task.model, batches(task.examples, task.processor, task.model.config, 4))
    for found in (task.survey, filled):
        assert found.sigma == pytest.approx(want, rel=1e-5)
        near(found.mean_image, embeddings[spans["image"]].mean(0))
        near(found.mean_deepstack, deepstack[:, spans["image"]].mean(1))
        near(found.deepstack_sigma, [layer[spans["image"]].std() for layer in deepstack])


@pytest.mark.parametrize("sigma", ["question", "vocabulary"])
def test_sigma_scales_the_noise(task, sigma):
    (usual,), (other,) = (task.corrupted("question_noise", sigma=name) for name in ("sequence", sigma))
    ratio = task.survey.sigma[sigma] / task.survey.sigma["sequence"]
    near(other.value, np.asarray(usual.value) * ratio, 1e-6)
    assert abs(ratio - 1) > 0.01


# Images


@pytest.mark.parametrize("corruption", VISUAL)
def test_image_corruptions_change_image_tokens_and_deepstack(task, corruption):
    embeddings, deepstack = task.corrupted(corruption)
    image = task.batch.spans["image"]
    np.testing.assert_array_equal((np.asarray(embeddings.value) != 0).any(-1), image)
    assert deepstack.site == "text.deepstack" and deepstack.slot.tolist() == [0, 1, *[2] * 6]
    for layer in np.asarray(deepstack.value):
        np.testing.assert_array_equal((layer != 0).any(-1), image)


def test_image_noise_is_of_the_layers_own_size(task):
    image = task.batch.spans["image"]
    embeddings, deepstack = (np.asarray(a.value) for a in task.corrupted("image_noise", noise_scale=0.5))
    assert embeddings[image].std() == pytest.approx(0.5 * task.survey.sigma["sequence"], rel=0.03)
    for layer, sigma in zip(deepstack, task.survey.deepstack_sigma, strict=True):
        assert layer[image].std() == pytest.approx(0.5 * sigma, rel=0.03)
    # Independent draws.
    drawn = [a[image].ravel() for a in (embeddings, *deepstack)]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.05


def test_mean_image(task, taps):
    image, means = task.batch.spans["image"], (task.survey.mean_image, task.survey.mean_deepstack[:, None])
    for clean, mean, added in zip(taps, means, task.corrupted("mean_image"), strict=True):
        became = clean + np.asarray(added.value)
        near(became[..., image, :] - mean, np.zeros_like(became[..., image, :]))


@pytest.mark.parametrize("corruption", VISUAL)
def test_clean_deepstack_would_be_another_corruption(task, corruption):
    """The trap of Qwen3-VL: features that DeepStack adds after the first layers go past the embeddings."""
    embeddings, deepstack = task.corrupted(corruption)
    off = deepstack.replace(value=0 * deepstack.value)
    whole, half = (
        probability(forward(task.model, task.batch.inputs, (embeddings, used)), task.batch) for used in (deepstack, off)
    )
    assert np.abs(whole - half).max() > 0.05


# Whole prompts: what a trace calls p_corrupt is what the model says to a prompt that was changed by hand.


def traced(task: Task, corruption: str, replicate: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """p_clean and p_corrupt ``(B,)`` of a trace."""
    corrupt = task.corrupter(corruption, replicates=replicate + 1)
    records = trace_batch(corrupt, task.rows, task.batch)
    return np.array([r["p_clean"] for r in records]), np.array([r["p_corrupt"][replicate] for r in records])


def partners(task: Task, corruption: str, replicate: int = 0) -> list[Example]:
    same = CORRUPTIONS[corruption].same
    return [counterpart(task.examples, row, replicate, 0, same) for row in range(len(task.examples))]


def with_images(task: Task, images) -> list[Example]:
    return [dataclasses.replace(e, images=(image,)) for e, image in zip(task.examples, images, strict=True)]


def prompts(task: Task, corruption: str, replicate: int = 0):
    """The examples as the corruption should leave them."""
    if corruption == "swapped_image":
        return with_images(task, [other.images[0] for other in partners(task, corruption, replicate)])
    blurred = [example.images[0].filter(ImageFilter.GaussianBlur(64 / 16)) for example in task.examples]
    return with_images(task, blurred)


def check_changed_prompts(task: Task) -> None:
    p_clean, p_corrupt = traced(task, "blurred_image")
    near(p_clean, changed(task, task.examples))
    near(p_corrupt, changed(task, prompts(task, "blurred_image")))
    near(traced(task, "swapped_image", 1)[1], changed(task, prompts(task, "swapped_image", 1)))


def test_changed_images(task):
    check_changed_prompts(task)
    said = [
        changed(task, prompts(task, *which)) for which in (("swapped_image", 0), ("swapped_image", 1), ("blurred",))
    ]
    said.append(changed(task, task.examples))
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(said, 2)) > 0.01


def test_images_of_other_sizes_are_resized(task):
    """A counterpart's larger image takes this one's places."""
    large = [dataclasses.replace(e, images=(e.images[0].resize((96, 96)),)) for e in task.examples[3:]]
    mixed = task._replace(examples=[*task.examples[:3], *large])
    embeddings, _ = mixed._replace(rows=[0, 1, 2], batch=padded(task, [0, 1, 2], 80)).corrupted("swapped_image")
    assert embeddings.value.shape[:2] == (3, 80)


def test_swapped_question(task):
    """Where the two questions are as long, it is the prompt with the other question; else its tokens go on from the
    start or stop."""
    others = partners(task, "swapped_question", 1)
    p_corrupt = traced(task, "swapped_question", 1)[1]
    swapped = [dataclasses.replace(e, question=o.question) for e, o in zip(task.examples, others, strict=True)]
    assert all(e.question != o.question for e, o in zip(task.examples, others, strict=True))
    batch = padded(task._replace(examples=swapped), range(len(swapped)), 80)
    lengths, own = (b.spans["question"].sum(1) for b in (batch, task.batch))
    alike = lengths == own
    assert alike.any() and (lengths > own).any() and (lengths < own).any()
    near(p_corrupt[alike], changed(task, swapped)[alike])
    ids = np.array(task.batch.inputs.input_ids)
    for row in range(len(swapped)):
        theirs = batch.inputs.input_ids[row, batch.spans["question"][row]].tolist()
        ids[row, task.batch.spans["question"][row]] = (theirs * 3)[: own[row]]
    near(p_corrupt, probability(forward(task.model, task.batch.inputs.replace(input_ids=ids)), task.batch))
    assert np.abs(p_corrupt - changed(task, task.examples)).max() > 0.1


# Counterparts


def example(name: str, answer: str, question: str = "What?", **fields) -> Example:
    return Example(name, (), question, (answer,), **fields)


def test_counterparts_have_another_answer_in_any_order():
    examples = [example(f"e{i}", "ab"[i % 2], f"q{i}") for i in range(8)]
    found = {e.id: [counterpart(examples, row, r).id for r in range(4)] for row, e in enumerate(examples)}
    for name, others in found.items():
        assert sorted(others) == [f"e{i}" for i in range(8) if i % 2 != int(name[1]) % 2]
    turned = examples[::-1]
    assert found == {e.id: [counterpart(turned, row, r).id for r in range(4)] for row, e in enumerate(turned)}
    assert counterpart(examples, 0, 4) == counterpart(examples, 0, 0)  # once round
    assert len({others[0] for others in found.values()}) > 2
    assert any(counterpart(examples, row, 0, seed=1).id != found[e.id][0] for row, e in enumerate(examples))


def test_counterparts_are_no_right_answer_and_something_to_swap():
    examples = [
        Example("own", (), "q", ("Cat.", "kitten")),
        example("same", "cat", "q2"),
        example("right", "Kitten", "q3"),
    ]
    with pytest.raises(UserError, match=r"'own' has no counterpart with another answer than 'Cat\.'"):
        counterpart(examples, 0)
    examples += [example("asked", "dog", "q")]
    assert counterpart(examples, 0).id == "asked"
    with pytest.raises(UserError, match="another question"):
        counterpart(examples, 0, same=CORRUPTIONS["swapped_question"].same)


def test_counterparts_have_another_image():
    same = CORRUPTIONS["swapped_image"].same
    red, blue, twin = (
        dataclasses.replace(example(name, name), images=load_task("mini-docvqa", limit=n)[-1].images)
        for name, n in (("red", 1), ("blue", 2), ("twin", 1))
    )
    assert [counterpart([red, twin, blue], row, same=same).id for row in (0, 1)] == ["blue", "blue"]
    page, other = (dataclasses.replace(e, image_id="page") for e in (red, blue))
    for examples in ([page, other], [red, twin], [red, example("text", "text")]):
        with pytest.raises(UserError, match="another image"):
            counterpart(examples, 0, same=same)


# Other families


@pytest.mark.parametrize("name", ["mini-gemma3", "mini-llava"])
def test_families_without_deepstack(name):
    """Every corruption is one addition, at its tokens alone, and p_corrupt is the changed prompt's."""
    task = make_task(name, [6, 7, 12])
    weight = np.asarray(task.model.text.embed_tokens.weight[...], np.float64)
    scale = task.model.config.text.hidden_size**0.5 if name == "mini-gemma3" else 1
    assert task.survey.sigma["vocabulary"] == pytest.approx(scale * weight.std(), rel=1e-5)
    assert task.survey.deepstack_sigma is None and task.survey.mean_deepstack is None
    for corruption in CORRUPTIONS:
        (added,) = task.corrupted(corruption)
        there = task.batch.spans["image" if corruption in VISUAL else "question"]
        touched = (np.asarray(added.value) != 0).any(-1)
        assert touched.any(1).all() and not (touched & ~there).any()
        assert corruption == "swapped_question" or (touched == there).all()
    check_changed_prompts(task)
