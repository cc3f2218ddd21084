"""Generation: token for token what transformers' greedy search gives, and sampling that its key decides."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import PAD, make_batch, tensors, tiny_config, tiny_model

import vlm_jax
from eval.evaluation import answer
from interventions import generate_variants
from vlm_jax.data import load_task
from vlm_jax.errors import UserError
from vlm_jax.generate import NOT_FINITE, decoding, generation_program
from vlm_jax.prompts import batches, encode

NEW = 12
PROMPTS = [
    [5, (4, 6), 3],
    [2, (8, 4), 4, (4, 6), 6],
    [17],
    [(2, 10), 9],
]
BATCHES = {side: make_batch(PROMPTS, side, seed=3) for side in ("left", "right")}
TEXT = {side: make_batch([[9], [4]], side, seed=4) for side in ("left", "right")}


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(tiny_config(), seed=5)


def oracle_tokens(oracle, batch, eos=None):
    """transformers' greedy continuation of a left-padded batch: (B, NEW), padded once a row has ended."""
    out = oracle.generate(
        **tensors(batch),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # A near tie would be decided by rounding, and so test nothing but the choice of seed.
    top = torch.stack(out.logits).topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 2e-3
    return full(out.sequences[:, batch["input_ids"].shape[1] :].numpy())


def full(tokens):
    """``tokens`` up to NEW columns: a batch whose every row has ended may be cut short."""
    return np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])), constant_values=PAD)


@pytest.fixture(scope="module")
def greedy(oracle):
    tokens = oracle_tokens(oracle, BATCHES["left"])
    assert min(len(set(row)) for row in tokens) > NEW // 2  # a model stuck on one token tests little
    return tokens


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return vlm_jax.load(folder)[0]


def generate(model, batch, new=NEW, **kwargs):
    tokens = np.asarray(vlm_jax.generate(model, vlm_jax.Inputs.from_hf(model.config, **batch), new, **kwargs))
    assert tokens.dtype == np.int32
    return tokens


def test_oracle_generates_what_its_forward_says(oracle, greedy):
    """transformers' cached decoding and its plain forward must agree, or the oracle itself is in doubt."""
    batch = BATCHES["left"]
    longer = {
        **batch,
        "input_ids": np.concatenate([batch["input_ids"], greedy], -1),
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (0, NEW)), constant_values=1),
        "mm_token_type_ids": np.pad(batch["mm_token_type_ids"], ((0, 0), (0, NEW))),
    }
    with torch.no_grad():
        said = oracle(**tensors(longer), use_cache=False).logits.argmax(-1).numpy()
    np.testing.assert_array_equal(said[:, -NEW - 1 : -1], greedy)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy(model, greedy, side):
    np.testing.assert_array_equal(generate(model, BATCHES[side]), greedy)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_without_images(oracle, model, side):
    np.testing.assert_array_equal(generate(model, TEXT[side]), oracle_tokens(oracle, TEXT["left"]))


@pytest.fixture(scope="module")
def eos(greedy):
    """Two tokens to stop at, as in the release: they end two rows midway, at different steps, and spare another."""
    tokens = [int(greedy[0, 5]), int(greedy[1, 4])]
    steps = [min((row.index(t) for t in tokens if t in row), default=None) for row in greedy.tolist()]
    assert steps[:2] == [5, 4] and None in steps
    return tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_stop_at_eos(oracle, model, eos, side, count):
    stop = eos[0] if count == 1 else eos
    want = oracle_tokens(oracle, BATCHES["left"], stop)
    assert want[0, 5] == eos[0] and (want[0, 6:] == PAD).all()
    np.testing.assert_array_equal(generate(model, BATCHES[side], eos_token_id=stop, pad_token_id=PAD), want)


def test_all_rows_stopped(oracle, model, greedy):
    stop = sorted({int(row[3]) for row in greedy})
    want = oracle_tokens(oracle, BATCHES["left"], stop)
    assert (want[:, 4:] == PAD).all()
    got = generate(model, BATCHES["right"], eos_token_id=stop, pad_token_id=PAD)
    np.testing.assert_array_equal(full(got), want)


def test_eos_of_the_folder(oracle, folder, eos, tmp_path):
    """Without an argument, the stop and pad tokens are those of generation_config.json."""
    model = copy.deepcopy(oracle)
    model.generation_config.update(eos_token_id=eos, pad_token_id=PAD)
    model.save_pretrained(tmp_path)
    want = oracle_tokens(oracle, BATCHES["left"], eos)
    np.testing.assert_array_equal(generate(vlm_jax.load(tmp_path)[0], BATCHES["left"]), want)


def test_sampling_is_decided_by_its_key(model, greedy):
    first, again, other = (generate(model, BATCHES["left"], temperature=1.0, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(again, first)
    for a, b in ((first, other), (first, greedy)):
        assert (a != b).any(-1).all()  # every row its own draw


@pytest.mark.parametrize("narrow", [{"temperature": 1e-5}, {"temperature": 1.0, "top_p": 1e-6}])
def test_narrow_sampling_is_greedy(model, greedy, narrow):
    np.testing.assert_array_equal(generate(model, BATCHES["right"], key=jax.random.key(0), **narrow), greedy)


@pytest.mark.parametrize("temperature, top_p", [(0.5, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_sampling_follows_the_distribution(oracle, model, temperature, top_p):
    """The first token over many copies of one prompt, against the oracle's probabilities."""
    rows = 2000
    one = make_batch([[6]], seed=6)
    with torch.no_grad():
        probs = (oracle(**tensors(one)).logits[0, -1].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probs)
    nucleus = order[: np.searchsorted(np.cumsum(probs[order]), top_p) + 1]
    probs = np.where(np.isin(np.arange(probs.size), nucleus), probs, 0)
    probs /= probs.sum()

    many = {name: np.repeat(array, rows, 0) for name, array in one.items()}
    drawn = generate(model, many, new=1, temperature=temperature, top_p=top_p, key=jax.random.key(0))
    frequency = np.bincount(drawn[:, 0], minlength=probs.size) / rows
    assert not frequency[probs == 0].any()
    assert (np.abs(frequency - probs) < 5 * np.sqrt(probs * (1 - probs) / rows) + 1e-3).all()


def test_same_shapes_compile_once(model):
    """Another batch of the same shapes, and another key, must not be compiled again."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def sample(seed):
        batch = make_batch([[3, (6, 4), 11], [7]], "left", seed)  # of no other test's shape
        generate(model, batch, temperature=0.7, top_p=0.9, key=jax.random.key(seed))
        return len(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first, second = sample(7), sample(8)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first > 0 and second == first


def test_an_intervention_on_the_final_norm_reaches_every_token(mini):
    """With the last site zeroed all logits are equal, so every token is the first of the vocabulary."""

    class Zero(vlm_jax.Intervention):
        sites = frozenset({"text.norm"})

        def __call__(self, site, value, ctx):
            return value * 0

    jax.tree_util.register_pytree_node(Zero, lambda zero: ((), None), lambda *_: Zero())
    model, processor = mini
    inputs = encode(load_task("perception", split="test", limit=2), processor, model.config, with_answer=False).inputs
    assert np.asarray(vlm_jax.generate(model, inputs, 4)).any()
    assert not np.asarray(vlm_jax.generate(model, inputs, 4, (Zero(),), pad_token_id=0, eos_token_id=1023)).any()


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


def test_more_tokens_than_the_model_takes_are_refused(mini):
    model = mini[0]
    longest = model.config.text.max_position_embeddings
    with pytest.raises(
        vlm_jax.UserError, match=f"max_new_tokens is {longest}, but prompt and answer can have {longest}"
    ):
        decoding(model, longest)
    assert decoding(model, longest - 1).count == longest - 1


# Scores that are not finite


class Spoil(vlm_jax.Intervention):
    """Puts a number into the last norm's output of one row, in the prompt or only in later steps."""

    sites = frozenset({"text.norm"})

    def __init__(self, row, number, later=False):
        self.row, self.number, self.later = row, number, later

    def __call__(self, site, value, ctx):
        return value.at[self.row].set(self.number) if ctx.decoding or not self.later else value


jax.tree_util.register_pytree_node(
    Spoil,
    lambda spoil: ((spoil.number,), (spoil.row, spoil.later)),
    lambda data, number: Spoil(data[0], *number, data[1]),
)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "key": jax.random.key(0)}], ids=["greedy", "sampled"])
def test_scores_that_are_not_finite(model, number, later, options):
    """They are no token 0: the row is named, and rows beside it are as they were."""
    inputs = vlm_jax.Inputs.from_hf(model.config, **BATCHES["left"])
    with pytest.raises(UserError, match="NaN or infinite for row 2 of the batch: check"):
        vlm_jax.generate(model, inputs, 3, (Spoil(2, number, later),), **options)
    with pytest.raises(UserError, match="for example 'c'"):
        vlm_jax.generate(model, inputs, 3, (Spoil(2, number, later),), names=["a", "b", "c"], **options)
    decoding_options = decoding(model, 3, eos_token_id=())
    sampling = (jnp.float32(1), jnp.float32(1), options["key"]) if options else None
    spoilt, whole = (
        np.asarray(generation_program(model, inputs, acting, decoding_options, sampling))
        for acting in ((Spoil(2, number, later),), ())
    )
    at = int(later)
    assert spoilt[2, at] == NOT_FINITE and (spoilt[2, at + 1 :] == decoding_options.pad).all()
    np.testing.assert_array_equal(spoilt[[0, 1, 3]], whole[[0, 1, 3]])


def test_the_example_without_finite_scores_is_named(mini):
    model, processor = mini
    examples = load_task("perception", split="test", limit=3)
    rows, _ = next(batches(examples, processor, model.config, 3, step=64, with_answer=False))
    with pytest.raises(UserError, match=f"for example {examples[rows[0]].id!r}"):
        answer(model, processor, examples, (Spoil(0, float("nan"), True),), batch=3, max_new_tokens=2)


def test_variants_whose_scores_are_not_finite(mini):
    model, processor = mini
    inputs = encode(load_task("perception", split="test", limit=2), processor, model.config, with_answer=False).inputs
    with pytest.raises(UserError, match="row 1 of the batch"):
        generate_variants(model, inputs, [Spoil(1, jnp.float32(number)) for number in (0.0, float("nan"))], 2)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_sampling_that_is_not_possible(model, options):
    inputs = vlm_jax.Inputs.from_hf(model.config, **BATCHES["left"])
    with pytest.raises(UserError, match="is not possible"):
        vlm_jax.generate(model, inputs, 1, key=jax.random.key(0), **options)
