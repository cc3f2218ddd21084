"""Causal tracing against torch: the corrupted run and every patch as hooks on transformers' own model.

``errors`` is the one judge. The controls break the oracle the way a port is most likely to be wrong; the same judge
must then object. The identities need no oracle.
"""

from contextlib import ExitStack
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import TEXT_TOKENS, Recorder, make_batch, oracle_sites, tensors, tiny_config, tiny_model

import vlm_jax
from interventions import Add, Patch, causal_trace, sweep
from interventions.engine import chunks
from interventions.trace import causal
from vlm_jax.errors import UserError

TOLERANCE, CAUGHT = 1e-5, 1e-4
LAYERS = 4  # one more than DeepStack reaches
ENGINES = ("sweep", "naive")
OUTPUTS = ("text.attn_out", "text.mlp_out")


class Row(NamedTuple):
    """A prompt in ``make_batch``'s parts, and which of the parts are the question and the gold answer."""

    parts: list
    question: int
    answer: int


# Images before the question, after it, on both sides and nowhere; gold answers of 3, 1, 2 and 4 tokens, of which the
# second is not the end of its row. Every question starts behind token 8, so that the runs share a prefix.
MIXED = [
    Row([9, (4, 6), 4, 7, 5, 3], 3, 5),
    Row([12, 5, (8, 4), 3, 1, 2], 1, 4),
    Row([10, (4, 6), 6, (2, 10), 4, 2], 2, 5),
    Row([14, 6, 4, 4], 1, 3),
]
TEXT_ONLY = [Row([3, 6, 4, 2], 1, 3), Row([11, 4, 2, 5], 1, 3)]  # the first question leaves no prefix to share


class Case(NamedTuple):
    """A batch as transformers takes it, its masks ``(B, T)`` and its noise ``(B, T, D)``."""

    batch: dict
    question: np.ndarray
    answer: np.ndarray
    noise: np.ndarray


def make_case(model, rows, left=(), seed=0):
    """The rows named in ``left`` are padded on the left, the others on the right.

    The gold tokens are those that the model itself would say: a random token's probability would be near 0 in every
    run, and so within any tolerance.
    """
    sides = {side: make_batch([row.parts for row in rows], side, seed) for side in ("left", "right")}
    batch = dict(sides["right"])
    for name in batch.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
        batch[name] = batch[name].copy()
        batch[name][list(left)] = sides["left"][name][list(left)]
    question, answer = (np.zeros_like(batch["input_ids"], bool) for _ in range(2))
    for i, row in enumerate(rows):
        sizes = [part if isinstance(part, int) else part[0] * part[1] // 4 + 2 for part in row.parts]
        ends = batch["attention_mask"][i].argmax() + np.cumsum(sizes)
        for mask, part in ((question, row.question), (answer, row.answer)):
            mask[i, ends[part] - sizes[part] : ends[part]] = True
    for nth in range(answer.sum(1).max()):
        with torch.no_grad():
            said = model(**tensors(batch), use_cache=False).logits[..., TEXT_TOKENS].argmax(-1).numpy()
        for i in np.flatnonzero(answer.sum(1) > nth):
            at = np.flatnonzero(answer[i])[nth]
            batch["input_ids"][i, at] = TEXT_TOKENS[said[i, at - 1]]
    noise = 0.6 * np.random.default_rng(seed).standard_normal((*question.shape, 64), np.float32)
    return Case(batch, question, answer, noise)


@pytest.fixture(scope="module")
def oracle():
    model = tiny_model(tiny_config(text={"num_hidden_layers": LAYERS}), seed=5)
    with torch.no_grad():
        model.lm_head.weight *= 2  # decided enough for probabilities away from 0
    return model


@pytest.fixture(scope="module")
def model(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return vlm_jax.load(folder)[0]


@pytest.fixture(scope="module")
def cases(oracle):
    return {
        "both": make_case(oracle, MIXED, (0, 3)),  # row 3's part of the shared prefix is padding alone
        "text": make_case(oracle, TEXT_ONLY, (0,), seed=1),
    }


BATCHES = ("both", "text")


def inputs_of(model, case):
    return vlm_jax.Inputs.from_hf(model.config, **case.batch)


@pytest.fixture(scope="module")
def traces(model, cases):
    """What the library makes of each batch with each engine."""
    known = {}

    def get(name, engine):
        if (name, engine) not in known:
            case = cases[name]
            traced = causal_trace(
                model, inputs_of(model, case), case.question, case.answer, noise=case.noise, engine=engine
            )
            known[name, engine] = jax.device_get(traced)
        return known[name, engine]

    return get


# The oracle


def geometric(p):
    return np.prod(p) ** (1 / len(p))


def gold_probability(logits, case, mean=geometric, behind=1):
    """(B,): each gold token's probability is read ``behind`` tokens before it."""
    probs = logits.double().softmax(-1).numpy()
    rows = []
    for i, (ids, answer) in enumerate(zip(case.batch["input_ids"], case.answer, strict=True)):
        at = np.flatnonzero(answer)
        rows.append(mean(probs[i, at - behind, ids[at]]))
    return np.array(rows)


def oracle_trace(model, case, *, where=None, deepstack=True, shift=0, patched=True, **score):
    """p_clean, p_corrupt ``(B,)`` and ie ``(B, L, 2)`` by torch hooks.

    Controls: ``where`` the noise goes instead of the question; ``deepstack`` off in all but the clean run; the outputs
    of ``shift`` layers further up restored; only ``patched`` tokens restored; and those of ``gold_probability``.
    """
    text = model.model.language_model
    noise = torch.from_numpy(case.noise * (case.question if where is None else where)[..., None])
    modules = [[layer.self_attn, layer.mlp] for layer in text.layers]

    def corrupt(module, args, kwargs):
        kwargs = kwargs | {"inputs_embeds": kwargs["inputs_embeds"] + noise}
        return args, kwargs if deepstack else kwargs | {"deepstack_visual_embeds": None}

    def run(module=None, clean=None):
        def patch(module, args, out):
            old = out[0] if isinstance(out, tuple) else out
            new = torch.where(torch.as_tensor(patched)[..., None], clean, old)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        with ExitStack() as hooks, torch.no_grad():
            for handle in (
                text.register_forward_pre_hook(corrupt, with_kwargs=True),
                *([module.register_forward_hook(patch)] if module else ()),
            ):
                hooks.callback(handle.remove)
            return gold_probability(model(**tensors(case.batch), use_cache=False).logits, case, **score)

    with Recorder() as recorder, torch.no_grad():
        for layer, pair in enumerate(modules):
            for kind, module in enumerate(pair):
                recorder.output((layer, kind), module)
        p_clean = gold_probability(model(**tensors(case.batch), use_cache=False).logits, case, **score)
    p_corrupt = run()
    ie = np.empty((len(p_clean), LAYERS, 2))
    for layer in range(LAYERS):
        for kind in range(2):
            there = (layer + shift) % LAYERS
            ie[:, layer, kind] = run(modules[there][kind], recorder.one((there, kind))) - p_corrupt
    return p_clean, p_corrupt, ie


def errors(traced, want):
    """The largest absolute difference of p_clean, p_corrupt and ie."""
    return [np.abs(got - w).max() for got, w in zip((traced.p_clean, traced.p_corrupt, traced.ie), want, strict=True)]


@pytest.fixture(scope="module")
def wanted(oracle, cases):
    return {name: oracle_trace(oracle, case) for name, case in cases.items()}


@pytest.mark.parametrize("name", BATCHES)
def test_oracle_is_a_hard_case(wanted, name):
    """Agreement says little where nothing is known, nothing is lost or nothing is restored."""
    p_clean, p_corrupt, ie = wanted[name]
    assert p_clean.min() > 0.05 and p_clean.max() < 0.99
    assert (np.abs(p_clean - p_corrupt) > 0.003).all()
    assert (np.abs(ie).max(0) > 0.003).all() and ie.min() < -0.003 and ie.max() > 0.003


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_torch_hooks(wanted, traces, name, engine):
    assert max(errors(traces(name, engine), wanted[name])) < TOLERANCE


@pytest.mark.parametrize("name", BATCHES)
def test_sweep_equals_naive(traces, name):
    fast, slow = traces(name, "sweep"), traces(name, "naive")
    assert max(errors(fast, (slow.p_clean, slow.p_corrupt, slow.ie))) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_te_and_rr_follow_from_the_rest(traces, engine):
    traced = traces("both", engine)
    np.testing.assert_allclose(traced.te, traced.p_clean - traced.p_corrupt, rtol=1e-6)
    np.testing.assert_allclose(traced.rr, traced.ie / (traced.te + 1e-8)[:, None, None], rtol=1e-6)


# control -> what the oracle is told, and the first of p_clean, p_corrupt, ie that it must change
CONTROLS = {
    "wrong layer": ({"shift": 1}, 2),
    "noise on every token": ({"where": True}, 1),
    "noise on the answer too": ({"where": "question and answer"}, 1),
    "no DeepStack after the clean run": ({"deepstack": False}, 1),
    "arithmetic mean": ({"mean": np.mean}, 0),
    "first gold token alone": ({"mean": lambda p: p[0]}, 0),
    "read at the gold token": ({"behind": 0}, 0),
    "question restored alone": ({"patched": "question"}, 2),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_caught(oracle, cases, traces, control):
    case, (broken, first) = cases["both"], CONTROLS[control]
    masks = {
        True: case.batch["attention_mask"] == 1,
        "question": case.question,
        "question and answer": case.question | case.answer,
    }
    broken = {name: masks[v] if name in ("where", "patched") else v for name, v in broken.items()}
    found = errors(traces("both", "sweep"), oracle_trace(oracle, case, **broken))
    assert min(found[first:]) > CAUGHT and max(found[:first], default=0) < TOLERANCE, found


# Identities


def slots(layers):
    """A slot table that puts slot ``i`` in layer ``i`` for the ``layers`` and nothing elsewhere."""
    return jnp.array([i if i in layers else LAYERS for i in range(LAYERS)])


PATCHED = (*OUTPUTS, "text.resid_pre")


@pytest.fixture(scope="module")
def patched(model, cases):
    """The clean taps, the clean probabilities ``(real tokens, V)``, and a function that gives them after patches."""
    case = cases["both"]
    inputs, real = inputs_of(model, case), case.batch["attention_mask"] == 1

    def probabilities(out):
        return np.asarray(jax.nn.softmax(out.logits))[real]

    clean = jax.jit(lambda: model(inputs, taps=PATCHED))()
    run = jax.jit(lambda noise, patch: model(inputs, (Add(noise), patch)))

    def patch(slot, donor=clean.taps, noise=0):
        """``slot`` by site, null where not named; the case's noise times ``noise`` goes to the question."""
        slot = {site: slots([]) for site in PATCHED} | slot
        return probabilities(run(noise * case.noise * case.question[..., None], Patch(donor, slot)))

    return clean.taps, probabilities(clean), patch


@flax.struct.dataclass
class Whole:
    """A read-out that keeps everything."""

    first: int = flax.struct.field(pytree_node=False, default=0)

    def __call__(self, model, x, start):
        assert start == 0
        return x


def test_own_activations_change_nothing(patched):
    taps, clean, patch = patched
    everywhere = {site: slots(range(LAYERS)) for site in PATCHED}
    np.testing.assert_allclose(patch(everywhere), clean, atol=TOLERANCE)
    # Not because a patch does nothing.
    assert np.abs(patch(everywhere, {site: donor[::-1] for site, donor in taps.items()}) - clean).max() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_noise_has_no_effect(model, cases, engine):
    case = cases["both"]
    zeros = np.zeros_like(case.noise)
    traced = causal_trace(model, inputs_of(model, case), case.question, case.answer, noise=zeros, engine=engine)
    np.testing.assert_allclose(traced.te, 0, atol=1e-6)
    np.testing.assert_allclose(traced.ie, 0, atol=1e-6)


def test_restoring_the_residual_stream_of_any_layer_gives_the_clean_run(patched):
    _, clean, patch = patched
    assert np.abs(patch({}, noise=1) - clean).max() > 0.1
    for layer in range(LAYERS):
        restored = patch({"text.resid_pre": slots([layer])}, noise=1)
        np.testing.assert_allclose(restored, clean, atol=TOLERANCE)


def test_sweep_restores_the_residual_stream(model, cases):
    """The same through the engine: one variant per layer, each of which must end as the clean run."""
    case = cases["both"]
    inputs, real = inputs_of(model, case), case.batch["attention_mask"] == 1
    noise = Add(jnp.asarray(case.noise * case.question[..., None]))

    def run(interventions=()):
        return model(inputs, interventions, ["text.resid_pre", "text.norm"]).taps

    clean, corrupt = run(), run((noise,))["text.norm"]
    donor = {"text.resid_pre": clean["text.resid_pre"]}
    patches = [Patch(donor, {"text.resid_pre": slots([layer])}) for layer in range(LAYERS)]
    restored = np.asarray(sweep(model, inputs, patches, Whole(), base=(noise,)))[:, real]
    clean = np.asarray(clean["text.norm"])[real]
    assert np.abs(np.asarray(corrupt)[real] - clean).max() > 0.1
    np.testing.assert_allclose(restored, np.broadcast_to(clean, restored.shape), atol=TOLERANCE)


def test_noise_outside_the_question_is_ignored(model, cases, traces):
    case, whole = cases["both"], traces("both", "sweep")
    louder = np.where(case.question[..., None], case.noise, 100)
    traced = causal_trace(model, inputs_of(model, case), case.question, case.answer, noise=louder)
    assert errors(traced, (whole.p_clean, whole.p_corrupt, whole.ie)) == [0, 0, 0]


@pytest.mark.parametrize("variants", [0, 3])
def test_chunk_size_does_not_matter(model, cases, traces, monkeypatch, variants):
    """Chunks of one variant (too little room for even that), and chunks that do not divide the 8 variants."""
    case = cases["text"]
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", {"cpu": 1 + variants * case.question.size})
    traced = causal_trace(model, inputs_of(model, case), case.question, case.answer, noise=case.noise)
    whole = traces("text", "naive")
    assert max(errors(traced, (whole.p_clean, whole.p_corrupt, whole.ie))) < TOLERANCE


def test_batching_does_not_matter(model, cases, traces):
    """A row's trace is the same beside other neighbours, in another order, and behind a prefix of another length."""
    case, whole, rows = cases["both"], traces("both", "sweep"), [2, 0]
    traced = causal_trace(
        model, inputs_of(model, case).take(rows), case.question[rows], case.answer[rows], noise=case.noise[rows]
    )
    assert max(errors(traced, (whole.p_clean[rows], whole.p_corrupt[rows], whole.ie[rows]))) < TOLERANCE


def test_same_shapes_compile_once(oracle, model):
    """Other prompts, images, noise, question lengths and gold lengths must not be compiled again; only gold answers of
    one or two tokens have programs of their own, which unembed fewer positions."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def trace(rows, seed):
        case = make_case(oracle, rows, seed=seed)
        causal_trace(model, inputs_of(model, case), case.question, case.answer, noise=case.noise)
        return len(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = trace([Row([9, (4, 6), 4, 2, 3], 2, 4)], 6)  # of no other test's shape
        second = trace([Row([9, (6, 4), 3, 2, 4], 2, 4)], 7)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first > 0 and second == first


# The noise that is drawn


def drawn_noise(model, case, monkeypatch, **how):
    """What the engine is given where the caller gives no noise."""
    seen = []

    class Stopped(Exception):
        pass

    def engine(*args, base, **how):
        seen.append(np.asarray(base[0].value))
        raise Stopped

    monkeypatch.setattr(causal, "sweep_runs", engine)
    with pytest.raises(Stopped):
        causal_trace(model, inputs_of(model, case), case.question, case.answer, **how)
    return seen[0]


def test_sigma_is_the_std_of_all_elements_of_real_tokens(oracle, model, cases):
    case = cases["both"]
    embeddings = oracle_sites(oracle, case.batch)["text.embeddings"]  # visual tokens included, NaN at padding
    padded = np.nan_to_num(embeddings, nan=50)
    sigma = float(causal.embedding_std(padded, case.batch["attention_mask"] == 1))
    assert sigma == pytest.approx(np.nanstd(embeddings.astype(np.float64)), rel=1e-5)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_drawn_noise(oracle, model, cases, monkeypatch, scale):
    case = cases["text"]
    case = case._replace(question=case.batch["attention_mask"] == 1)  # more elements, a better estimate
    sigma = np.nanstd(oracle_sites(oracle, case.batch)["text.embeddings"])
    first, again, other = (
        drawn_noise(model, case, monkeypatch, noise_scale=scale, key=jax.random.key(key)) for key in (0, 0, 1)
    )
    drawn = first[case.question]
    assert drawn.std() == pytest.approx(scale * sigma, rel=0.05)
    assert abs(drawn.mean()) < 0.1 * drawn.std()
    assert not first[~case.question].any()
    np.testing.assert_array_equal(again, first)
    assert (other != first)[case.question].mean() > 0.99


# Refusals


@pytest.mark.parametrize("mask", ["question", "answer"])
def test_row_without_question_or_answer(model, cases, mask):
    case = cases["text"]
    emptied = getattr(case, mask).copy()
    emptied[1] = False
    case = case._replace(**{mask: emptied})
    with pytest.raises(UserError, match=f"row 1.*{mask}"):
        causal_trace(model, inputs_of(model, case), case.question, case.answer, noise=case.noise)


def test_gold_token_without_a_predecessor(model, cases):
    case = cases["text"]
    first = case.answer.copy()
    first[1, 0] = True  # row 1 is padded on the right
    with pytest.raises(UserError, match="first"):
        causal_trace(model, inputs_of(model, case), case.question, first, noise=case.noise)


def test_unknown_engine(model, cases):
    case = cases["text"]
    with pytest.raises(UserError, match="'sweep'"):
        causal_trace(model, inputs_of(model, case), case.question, case.answer, engine="fast")


NOTHING = jnp.zeros((LAYERS, 1, 1, 1))


@pytest.mark.parametrize(
    "intervention, message",
    [
        (Patch({"text.mlp_ou": NOTHING}, {"text.mlp_ou": slots([0])}), "unknown site.*'text.mlp_out'"),
        (Add(NOTHING, "embeddings"), "unknown site.*text.embeddings"),
        (Patch({"text.deepstack": NOTHING}, {"text.deepstack": slots([0])}), "touches nothing.*text.deepstack"),
        (Patch({}, {}), "touches nothing"),
    ],
    ids=["misspelt", "no tower", "absent", "empty"],
)
def test_intervention_that_cannot_act(model, cases, intervention, message):
    inputs = inputs_of(model, cases["text"])  # without images, and so without DeepStack
    for call in (lambda: model(inputs, (intervention,)), lambda: vlm_jax.generate(model, inputs, 1, (intervention,))):
        with pytest.raises(UserError, match=message):
            call()


def test_unknown_tap(model, cases):
    with pytest.raises(UserError, match=r"'text\.attn_out'"):
        model(inputs_of(model, cases["text"]), taps=["text.atn_out"])
