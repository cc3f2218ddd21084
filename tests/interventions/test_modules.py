"""The names of modules and cells: what is written is what is parsed."""

import pytest

from interventions.modules import cell_names, folder_name, linears, module_names, split_cell
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
    assert linears(["L3-mlp"]) == [(3, "mlp.gate_proj"), (3, "mlp.up_proj"), (3, "mlp.down_proj")]
    assert [layer for layer, _ in linears(["L10-attn"])] == [10] * 4


def test_a_folders_name_does_not_depend_on_the_order():
    assert folder_name(["L1-mlp", "L0-attn"], 2) == folder_name(["L0-attn", "L1-mlp"], 2) == "L0-attn+L1-mlp"
    assert folder_name(module_names(2), 2) == "all"
