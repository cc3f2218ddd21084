"""Gates of modules and heads against PyTorch hooks and against models without the weights."""

import numpy as np
import pytest
import torch
from hf_oracle import (
    writer,
)
from kind_cases import (
    CAUGHT,
    EXACT,
    HEADS,
    LAYERS,
    MODULES,
    TOLERANCE,
    error,
    head_edit,
    mixed,
    only,
    without_weights,
)

from interventions import (
    Gate,
    HeadGate,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


def test_head_gate_equals_hook(case):
    """Heads of several layers at several strengths, 0 among them."""
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[0, 1], scale[2, 3], scale[3, 0] = 0, 0.5, 2

    def wanted(scale):
        gates = torch.from_numpy(scale)
        return case.wanted(
            *(head_edit(case, lambda x, g=gates[layer]: x * g[:, None])(layer) for layer in range(LAYERS))
        )

    got = case.logits(head_gate=HeadGate(scale))
    assert error(got, wanted(scale)) < TOLERANCE
    assert error(got, wanted(np.roll(scale, 1, 1))) > CAUGHT and error(got, wanted(np.roll(scale, 1, 0))) > CAUGHT


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_cut_equals_hook(case, layer, modules):
    def wanted(layer):
        return case.wanted(*((writer(case.layers[layer], module), "output", torch.zeros_like) for module in modules))

    gate = Gate.cut(LAYERS, [layer], modules)
    scale = case.neutral["gate"].scale | gate.scale
    got = case.logits(gate=case.neutral["gate"].replace(scale=scale))
    assert error(got, wanted(layer)) < TOLERANCE
    assert error(got, wanted((layer + 1) % LAYERS)) > CAUGHT


def test_gate_on_some_tokens_equals_hook(case):
    def half(x):
        return mixed(case.some, 0.5 * x, x)

    scale = {site: only(1, 0.5, 1) for site in case.donor}
    got = case.logits(gate=Gate(scale, where=case.some))
    edits = [(writer(case.layers[1], module), "output", half) for module in ("attn", "mlp")]
    assert error(got, case.wanted(*edits)) < TOLERANCE
    assert error(got, case.wanted(edits[0])) > CAUGHT


@pytest.mark.parametrize("layer", range(LAYERS))
def test_gated_attention_has_no_weights(case, layer):
    scale = case.neutral["gate"].scale | Gate.cut(LAYERS, [layer]).scale
    cut = case.logits(gate=case.neutral["gate"].replace(scale=scale))
    zeroed = without_weights(case.model, layer, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert error(cut, case.logits(model=zeroed)) < EXACT
    assert error(cut, case.logits()) > CAUGHT


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_cut_changes_every_row(case, layer, modules):
    scale = case.neutral["gate"].scale | Gate.cut(LAYERS, [layer], modules).scale
    cut, clean = case.logits(gate=case.neutral["gate"].replace(scale=scale)), case.logits()
    ends = np.cumsum(case.real["left"].sum(1)) - 1
    assert (np.abs(cut - clean)[ends].max(-1) > CAUGHT).all()
