"""The modules of a decoder, "L3-attn" and "L7-mlp": their names and their linears. Only this
file writes and parses such names."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from vlm_jax.errors import UserError, nearest
from vlm_jax.sites import TEXT_LINEARS

#: The modules of a layer, and where their outputs are.
MODULES = ("attn", "mlp")
MODULE_SITES = ("text.attn_out", "text.mlp_out")


def module_names(depth: int) -> list[str]:
    """``L0-attn, L0-mlp, L1-attn, ...``: the modules in the order of ``rr[...].ravel()``."""
    return cell_names(depth)


def cell_names(depth: int, *, heads: int | None = None, groups: Sequence[str] = ()) -> list[str]:
    """The names of a trace's cells, layer by layer.

    Args:
        heads: the number of attention heads, if the cells are heads: ``L0-H0, L0-H1, ...``. None: they are modules.
        groups: token groups. If there are several, a cell is one group of a module or head:
            ``L0-attn@question, L0-attn@last, ...``.
    """
    kinds = MODULES if heads is None else [f"H{head}" for head in range(heads)]
    endings = [f"@{group}" for group in groups] if len(groups) > 1 else [""]
    return [f"L{layer}-{kind}{ending}" for layer in range(depth) for kind in kinds for ending in endings]


def split_cell(cell: str) -> tuple[int, str]:
    """The layer and the kind of a cell: ``(3, "attn@question")`` of "L3-attn@question".

    Raises:
        UserError: for a string that is not the name of a cell.
    """
    match = re.fullmatch(r"L(\d+)-(.+)", cell)
    if match is None:
        raise UserError(f"{cell!r} is not the name of a cell: write its layer and module, such as L3-attn")
    return int(match[1]), match[2]


def folder_name(names: Sequence[str], depth: int) -> str:
    """A folder's name for a set of modules. It does not depend on their order, so that placements which choose the same
    modules share a folder."""
    modules = module_names(depth)
    if set(names) == set(modules):
        return "all"
    joined = "+".join(sorted(names, key=modules.index))
    if len(joined) <= 64:
        return joined
    return f"{len(names)}-{hashlib.sha256(joined.encode()).hexdigest()[:12]}"


#: P0 places k = 10 of the 72 modules of Qwen3-VL-4B.
PAPER_SHARE = 10 / 72


def default_k(depth: int) -> int:
    """P0's share of the modules: 10 for 36 layers, 2 for 8."""
    return max(1, round(PAPER_SHARE * 2 * depth))


def check_k(k: int, depth: int) -> int:
    """Returns ``k``.

    Raises:
        UserError: if ``k`` is below 1 or above the number of modules of a model with ``depth`` layers.
    """
    if not 1 <= k <= 2 * depth:
        raise UserError(f"k is {k}, but the model has {2 * depth} modules: choose 1 to {2 * depth}")
    return k


def check_names(names: Iterable[str], depth: int) -> list[str]:
    """The names as a list.

    Raises:
        UserError: for a name that is not a module of a model with ``depth`` layers, or that appears twice.
    """
    names, known = list(names), module_names(depth)
    for name in names:
        if name not in known:
            raise UserError(f"unknown module {name!r}{nearest(name, known)}")
    if len(set(names)) < len(names):
        raise UserError(f"a module is named twice in {', '.join(names)}: name each once")
    return names


def linears(names: Iterable[str]) -> list[tuple[int, str]]:
    """The ``(layer, linear)`` pairs behind module names: attn = q, k, v, o; mlp = gate, up, down."""
    pairs = []
    for name in names:
        layer, module = split_cell(name)
        pairs += [(layer, linear) for linear in TEXT_LINEARS[module]]
    return pairs
