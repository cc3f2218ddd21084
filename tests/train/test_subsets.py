"""Trainings of some leaves of a pytree: what moves, and that nothing is spent on what does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.loop import fit
from train.objective import adamw, linear_decay
from train.step import Step, update
from train.subsets import ByPart, partitioned, split
from vlm_jax import UserError

SGD, ADAM = optax.sgd(0.1), optax.adam(0.1)


def params() -> dict:
    """A two-layer network whose first layer is to stay as it is, with a table of whole numbers beside it."""
    first, second = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    return {
        "base": {"kernel": jnp.asarray(first), "steps": jnp.arange(3)},
        "a": jnp.asarray(second),
        "b": jnp.ones(4),
    }


def label(path: str) -> str:
    return "freeze" if path.startswith("base.") else path


def loss(params, batch, key):
    hidden = jnp.tanh(batch @ params["base"]["kernel"])
    return jnp.mean((hidden @ params["a"] + params["b"]) ** 2)


def batches(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(2, 8, 4)).astype(np.float32)


TRANSFORMS = {"a": ADAM, "b": SGD}


def test_frozen_leaves_stay_bit_equal_and_the_others_move():
    before = jax.tree.map(np.array, params())
    after = fit(loss, params(), batches, TRANSFORMS, label, steps=3).params
    chex.assert_trees_all_equal(after["base"], before["base"])
    assert all(np.abs(after[name] - before[name]).min() > 0 for name in "ab")


def test_frozen_leaves_are_handed_through_and_not_copied():
    given = params()
    after = fit(loss, given, batches, TRANSFORMS, label, steps=1).params
    assert after["base"]["kernel"] is given["base"]["kernel"]
    assert not given["a"].is_deleted(), "the caller's arrays are not written over"


def test_the_optimiser_holds_nothing_of_frozen_leaves():
    trained, rest = split(params(), label)
    assert trained.keys() == {"a", "b"} and rest.leaves.keys() == {"base.kernel", "base.steps"}
    state = Step(loss, partitioned(TRANSFORMS, label)).begin(trained)
    # Adam's two moments and count for "a"; plain SGD has none for "b".
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state)) == [(), (4, 4), (4, 4)]
    every = Step(loss, partitioned({"train": ADAM}, lambda path: "train")).begin(split(params(), lambda _: "train")[0])
    assert len(jax.tree.leaves(every.opt_state)) == 9, "the control: all leaves, two moments each"


def test_a_step_on_the_whole_tree_with_set_to_zero_is_the_same():
    """The slow twin: all leaves are differentiated and have an update, which is zero where the label is freeze."""
    tree = params()
    tree["base"].pop("steps")
    tx = partitioned(TRANSFORMS, label, clip=0.5)
    state, whole, key = tx.init(tree), tree, jax.random.key(0)
    for step in range(4):
        micro = batches(step)[:1]
        grads = jax.grad(loss)(whole, micro[0], key)
        grads["base"]["kernel"] = jnp.zeros_like(grads["base"]["kernel"])  # or clipping would count it
        updates, state = tx.update(grads, state, whole)
        whole = optax.apply_updates(whole, updates)
    fast = fit(loss, tree, lambda step: batches(step)[:1], TRANSFORMS, label, steps=4, clip=0.5).params
    chex.assert_trees_all_close(fast, whole, rtol=1e-6)
    bare = fit(loss, tree, lambda step: batches(step)[:1], TRANSFORMS, label, steps=4).params
    assert np.abs(bare["a"] - whole["a"]).max() > 1e-4, "the control: clipping matters"


def cost(rule) -> tuple[float, int]:
    """FLOPs and temporary bytes of a step."""
    trained, rest = split(wide(), rule)
    step = Step(deep, partitioned(dict.fromkeys({rule(name) for name in trained}, SGD), rule))
    batch = jnp.ones((1, 64, 128))
    program = update.lower(step.begin(trained), rest, batch, jax.random.key(0), step=step).compile()
    return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


def wide() -> dict:
    return {f"w{i}": jnp.eye(128) for i in range(4)}


def deep(params, batch, key):
    for kernel in params.values():
        batch = jnp.tanh(batch @ kernel)
    return jnp.mean(batch**2)


def test_frozen_leaves_cost_no_backward_pass():
    """Four layers, the last of which is trained: four products forward and one for its gradient, of twelve in all."""
    product = 2 * 64 * 128 * 128
    flops, memory = cost(lambda path: "train" if path == "w3" else "freeze")
    every, more = cost(lambda path: "train")
    assert 5 * product <= flops < 5.5 * product
    assert 11 * product <= every and memory < more


def test_each_label_has_its_own_optimiser():
    after = fit(loss, params(), batches, {"a": optax.set_to_zero(), "b": SGD}, label, steps=2).params
    np.testing.assert_array_equal(after["a"], params()["a"])
    assert np.abs(after["b"] - 1).min() > 0


def test_equal_trainings_share_an_optimiser():
    """Rules that are equal, optimisers that are cached: nothing is compiled again."""

    def made(rate: float, parts: tuple[str, ...]):
        return partitioned({"text": adamw(linear_decay(rate, 10))}, ByPart(parts), 1.0)

    assert made(1e-3, ("text",)) is made(1e-3, ("text",))
    assert made(1e-3, ("text",)) is not made(2e-3, ("text",))
    assert made(1e-3, ("text",)) is not made(1e-3, ("text", "visual"))


def test_joined_is_the_inverse_of_split():
    given = params()
    trained, rest = split(given, label)
    back = rest.joined(trained)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(given), strict=True))
    assert rest.trained_of(given).keys() == trained.keys()


@pytest.mark.parametrize(
    ("tree", "rule", "transforms", "says"),
    [
        ({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, lambda path: "train", {"train": SGD}, "have the same path"),
        ({"a": jnp.ones(1)}, lambda path: "freeze", {"train": SGD}, "nothing to train"),
        ({"a": jnp.ones(1)}, lambda path: "else", {"train": SGD}, "a has the label 'else', which has no optimiser"),
        ({"a": jnp.ones(1)}, lambda path: "train", {"freeze": SGD}, "the label 'freeze' has a transformation"),
    ],
)
def test_refusals(tree, rule, transforms, says):
    with pytest.raises(UserError, match=says):
        fit(lambda tree, batch, key: jnp.sum(tree["a"]), tree, batches, transforms, rule, steps=1)
