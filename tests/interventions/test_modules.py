"""The names of modules and cells: what is written is what is parsed."""

import pytest

from interventions.modules import cell_names, folder_name, linears, module_names, split_cell, tower_names
from vlm_jax import UserError


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("groups", [(), ("all",), ("question", "image+last")])
def test_names_are_parsed_as_they_are_written(heads, groups):
    names = cell_names(4, heads=heads, groups=groups)
    kinds = ["attn", "mlp"] if heads is None else ["H0", "H1", "H2"]
    endings = [f"@{group}" for group in groups] if len(groups) > 1 else [""]
    assert [split_cell(name) for name in names] == [(n, k + e) for n in range(4) for k in kinds for e in endings]


def test_modules_come_layer_by_layer():
    assert module_names(2) == ["L0-attn", "L0-mlp", "L1-attn", "L1-mlp"]
    assert split_cell("L12-mlp") == (12, "mlp")


@pytest.mark.parametrize("name", ["mlp", "L3", "L3-", "layer3-mlp"])
def test_a_string_that_is_not_a_cell_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' is not the name of a cell"):
        split_cell(name)


def test_linears_of_modules():
    assert linears(["L3-mlp"]) == {f"text.mlp.{name}_proj": [3] for name in ("down", "gate", "up")}
    assert linears(["L10-attn", "L2-attn"]) == {f"text.self_attn.{name}_proj": [2, 10] for name in "koqv"}
    sites = ["visual.attn.qkv", "visual.attn.proj", "visual.mlp.fc1", "text.mlp.up_proj", "projector.linear_1"]
    assert linears(["V1-attn", "V3-mlp", "V0-attn"], sites) == {
        "visual.attn.proj": [0, 1],
        "visual.attn.qkv": [0, 1],
        "visual.mlp.fc1": [3],
    }


def test_a_folders_name_does_not_depend_on_the_order():
    assert folder_name(["L1-mlp", "L0-attn"], 2) == folder_name(["L0-attn", "L1-mlp"], 2) == "L0-attn+L1-mlp"
    assert folder_name(module_names(2), 2, 3) == "all" and folder_name(tower_names(3), 2, 3) == "tower"
    assert folder_name(["V1-mlp", "L1-mlp", "V0-mlp"], 2, 3) == "L1-mlp+V0-mlp+V1-mlp"
