"""Where LoRA goes: names of modules, and P0's ways to choose them (section 2.4, equations 7 and 8)."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from interventions.trace import MODULES, module_names
from vlm_jax.errors import UserError, nearest
from vlm_jax.sites import TEXT_LINEARS

PLACEMENTS = ("all", "random", "shared", "task_diff")
#: Of equation 7: the paper prints "e^{-8}", read here as 1e-8.
EPS = 1e-8
#: P0 places k = 10 of the 72 modules of Qwen3-VL-4B.
PAPER_SHARE = 10 / 72


def default_k(depth: int) -> int:
    """P0's share of the modules: 10 for 36 layers, 2 for 8."""
    return max(1, round(PAPER_SHARE * 2 * depth))


def check_k(k: int, depth: int) -> int:
    if not 1 <= k <= 2 * depth:
        raise UserError(f"k is {k}, but the model has {2 * depth} modules: choose 1 to {2 * depth}")
    return k


def shared(rr_mean: np.ndarray, k: int) -> list[str]:
    """The k modules of highest ``rr_mean (L, 2)``, best first (Top-k-shared)."""
    return _top(rr_mean, k)


def task_diff(rr_mean: np.ndarray, other: np.ndarray, k: int) -> list[str]:
    """The k modules where the normalised RR of this task group exceeds the other's most (Top-k-task-diff)."""
    return _top(normalised(rr_mean) - normalised(other), k)


def normalised(rr_mean: np.ndarray) -> np.ndarray:
    """Equation 7."""
    return rr_mean / (rr_mean.max() + EPS)


def random_k(depth: int, k: int, seed: int) -> list[str]:
    """k modules, uniformly at random (Random-k)."""
    chosen = np.random.default_rng(seed).choice(2 * depth, k, replace=False)
    return [module_names(depth)[i] for i in sorted(chosen)]


def _top(score: np.ndarray, k: int) -> list[str]:
    order = np.argsort(-score.ravel(), kind="stable")[:k]
    return [module_names(len(score))[i] for i in order]


def read_names(path: Path, depth: int) -> list[str]:
    """Module names from a JSON file: a list such as ``["L2-attn", "L7-mlp"]``."""
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f'placement file {path} cannot be read as JSON ({error}): write a list such as ["L2-attn"]'
        ) from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f'placement file {path} must hold a list of module names such as ["L2-attn", "L7-mlp"]')
    return check_names(names, depth)


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
