"""The modules of a decoder, "L3-attn" and "L7-mlp", and of a vision tower, "V3-attn": their names and their linears.
Only this file writes and parses such names."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from vlm_jax.errors import UserError, nearest
from vlm_jax.sites import TEXT_LINEARS

#: The modules of a layer, and where their outputs are.
MODULES = ("attn", "mlp")
MODULE_SITES = ("text.attn_out", "text.mlp_out")
_TEXT = tuple(f"text.{name}" for names in TEXT_LINEARS.values() for name in names)


def module_names(depth: int) -> list[str]:
    """``L0-attn, L0-mlp, L1-attn, ...``: the modules in the order of ``rr[...].ravel()``."""
    return cell_names(depth)


def tower_names(depth: int) -> list[str]:
    """``V0-attn, V0-mlp, V1-attn, ...``: the modules of a vision tower with ``depth`` blocks."""
    return in_tower(module_names(depth))


def in_tower(names: Iterable[str]) -> list[str]:
    """The names of the vision tower's modules in the places of the decoder's: "V3-attn" for "L3-attn"."""
    return [f"V{name.removeprefix('L')}" for name in names]


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


def folder_name(names: Sequence[str], depth: int, tower: int = 0) -> str:
    """A folder's name for a set of modules of a model with ``depth`` layers and ``tower`` vision blocks. It does not
    depend on their order, so that placements which choose the same modules share a folder."""
    modules = module_names(depth) + tower_names(tower)
    for every, name in ((module_names(depth), "all"), (tower_names(tower), "tower")):
        if set(names) == set(every):
            return name
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


def check_names(names: Iterable[str], depth: int, tower: int = 0) -> list[str]:
    """The names as a list.

    Raises:
        UserError: for a name that is not a module of a model with ``depth`` layers and ``tower`` vision blocks, or that
            appears twice.
    """
    names, known = list(names), module_names(depth) + tower_names(tower)
    for name in names:
        if name not in known:
            raise UserError(f"unknown module {name!r}{nearest(name, known)}")
    if len(set(names)) < len(names):
        raise UserError(f"a module is named twice in {', '.join(names)}: name each once")
    return names


def linears(names: Iterable[str], sites: Iterable[str] = _TEXT) -> dict[str, list[int]]:
    """Site of a linear -> the layers, ascending, whose linear is in one of the named modules. Of a decoder, attn = q,
    k, v, o; mlp = gate, up, down.

    Args:
        sites: those of the model's linears; by default a decoder's.
    """
    sites, placed = sorted(sites), {}
    for name in names:
        tower = name.startswith("V")
        layer, module = split_cell(f"L{name[1:]}" if tower else name)
        for site in sites:
            part, kind, *_ = site.split(".")
            if part == ("visual" if tower else "text") and kind.removeprefix("self_") == module:
                placed.setdefault(site, []).append(layer)
    return {site: sorted(placed[site]) for site in sites if site in placed}
