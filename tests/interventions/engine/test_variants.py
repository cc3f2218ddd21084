"""Where variants act: their first layers and tokens, and the defaults of a kind that says nothing of it."""

import jax
import numpy as np
import pytest

import vlm_jax
from interventions import Add, Gate, Patch, stack
from interventions.engine.variants import check_acts, first_layers, first_token
from interventions.kinds.base import kind
from interventions.kinds.layers import slots
from vlm_jax.errors import UserError
from vlm_jax.sites import Stage, stage

DEPTH, LENGTH = 4, 12


@kind
class Plain(vlm_jax.Intervention):
    """Defines no more than it must."""

    strength: jax.Array
    sites = frozenset({"text.resid_post"})

    def __call__(self, site, value, ctx):
        return value * self.strength


def gate(layer, **tokens):
    return Gate.cut(DEPTH, [layer], **tokens)


def from_token(index):
    return np.arange(LENGTH)[None] >= index


def test_defaults_are_every_layer_and_token():
    variants = stack([Plain(np.float32(i)) for i in range(3)])
    np.testing.assert_array_equal(first_layers(variants, DEPTH), [0, 0, 0])
    assert first_token(variants, LENGTH) == 0
    check_acts(variants)
    assert variants.missing == frozenset()
    plain = Plain(np.float32(1))
    assert plain.bound(None) is plain and plain.filled({}) is plain


def test_a_kind_needs_a_call():
    class Empty(vlm_jax.Intervention):
        sites = frozenset({"text.norm"})

    with pytest.raises(TypeError, match="__call__"):
        Empty()


def test_first_layer_is_that_of_the_first_part():
    variants = [(gate(2), gate(3)), (gate(3), gate(1))]
    np.testing.assert_array_equal(first_layers(stack(variants), DEPTH), [2, 1])


@pytest.mark.parametrize(
    "site, first", [("text.embeddings", 0), ("text.norm", DEPTH), ("visual.embeddings", 0), ("projector.merger", 0)]
)
def test_first_layer_outside_of_the_layers(site, first):
    variants = stack([Add(np.full(8, i, np.float32), site) for i in range(2)])
    np.testing.assert_array_equal(first_layers(variants, DEPTH), [first, first])


def test_first_token_is_the_earliest_of_any_variant():
    variants = [gate(1, where=from_token(index)) for index in (7, 5, 9)]
    assert first_token(stack(variants), LENGTH) == 5
    assert first_token(stack([(v, Plain(np.float32(1))) for v in variants]), LENGTH) == 0
    of_blocks = Gate({"visual.mlp_out": np.zeros(2, np.float32)}, where=from_token(7))  # of an image
    assert first_token(stack([of_blocks]), LENGTH) == 0


def test_patches_of_a_clean_run_begin_where_the_two_runs_differ():
    table = slots(DEPTH, [1])
    assert first_token(stack([Patch({"text.attn_out": None}, {"text.attn_out": table})]), LENGTH) == LENGTH
    values = np.zeros((1, 1, 8, 3), np.float32)  # of tokens 4 to 11
    patch = Patch({"text.attn_out": values}, {"text.attn_out": table}, start=4)
    assert first_token(stack([patch]), LENGTH) == 4


def test_the_part_that_acts_nowhere_is_named():
    parts = [(Plain(np.float32(i)), gate(1, scale=scale)) for i, scale in ((0, 0.5), (1, 1.0))]
    with pytest.raises(UserError, match="variant 1 touches nothing: its Gate"):
        check_acts(stack(parts))


def test_stages():
    assert {site: stage(site) for site in ("text.embeddings", "text.mlp_out", "text.norm")} == {
        "text.embeddings": Stage.ENTRY,
        "text.mlp_out": Stage.LAYERS,
        "text.norm": Stage.EXIT,
    }
    assert {stage(s) for s in vlm_jax.SITES if s.startswith(("visual.", "projector."))} == {Stage.VISION}
    with pytest.raises(UserError, match=r"'text\.mlp_ot'; did you mean 'text\.mlp_out'"):
        stage("text.mlp_ot")
