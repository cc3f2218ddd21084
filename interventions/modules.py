"""The modules of a decoder, "L3-attn" and "L7-mlp": how they are named, and which linears they are."""

from collections.abc import Iterable

from vlm_jax.errors import UserError, nearest
from vlm_jax.sites import TEXT_LINEARS

#: The modules of a layer, and where their outputs are.
MODULES = ("attn", "mlp")
MODULE_SITES = ("text.attn_out", "text.mlp_out")


def module_names(depth: int) -> list[str]:
    """``L0-attn, L0-mlp, L1-attn, ...``: the modules in the order of ``rr[...].ravel()``."""
    return [f"L{layer}-{module}" for layer in range(depth) for module in MODULES]


#: P0 places k = 10 of the 72 modules of Qwen3-VL-4B.
PAPER_SHARE = 10 / 72


def default_k(depth: int) -> int:
    """P0's share of the modules: 10 for 36 layers, 2 for 8."""
    return max(1, round(PAPER_SHARE * 2 * depth))


def check_k(k: int, depth: int) -> int:
    if not 1 <= k <= 2 * depth:
        raise UserError(f"k is {k}, but the model has {2 * depth} modules: choose 1 to {2 * depth}")
    return k


def check_names(names: Iterable[str], depth: int) -> list[str]:
    """The names, once each is known to be a module of a model with ``depth`` layers and is named once."""
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
        layer, module = name.removeprefix("L").split("-")
        assert module in MODULES, name
        pairs += [(int(layer), linear) for linear in TEXT_LINEARS[module]]
    return pairs
