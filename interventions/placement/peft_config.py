"""What the ``adapter_config.json`` of a PEFT folder says about a LoRA: which modules have it, their ranks and scales,
and which modules are saved whole.

PEFT has many options that change what an adapter computes. So the options that are read are listed here, with the
values that they may have, and everything else is refused.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.errors import UserError
from vlm_jax.files import read_json
from vlm_jax.time_limit import time_limit

#: Option -> the values with which PEFT computes LoRA or DoRA. Other initialisations, such as "pissa", change the base
#: weights each time that the adapter is loaded.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    "bias": ("none",),
    "use_rslora": (False, True),
    "use_dora": (False, True),
}
#: The values of all other options that are not in ``_FREE``: PEFT's words for "not used".
_OFF = (None, False, "", [], {})
#: Options that change nothing of what LoRA computes.
_FREE = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "megatron_core"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "fan_in_fan_out",
}
MERGE = "merge it with PEFT's merge_and_unload and load the merged model"
#: Option -> what to do where merging does not help or is not needed.
_ADVICE = {
    "peft_type": "train a LoRA",
    "init_lora_weights": "make it plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "monteclora_config"), "train it without this option"),
}


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _name(value: Any) -> bool:
    return _regex(value) and value != ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # float32 can hold it


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(value: Any) -> bool:
    return _whole(value) and value > 0


def _regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _all(values: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(check, values))


def _by_pattern(values: Any, check: Callable[[Any], bool]) -> bool:
    return values is None or (
        isinstance(values, dict) and all(map(_regex, values)) and all(map(check, values.values()))
    )


def _names(value: Any) -> bool:
    return _regex(value) or _all(value, lambda name: isinstance(name, str))


#: Option that is read -> the value that stands for a missing one, whether a value can be used, and what it must be.
_READ: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "r": (None, _rank, "a whole number above 0"),
    "lora_alpha": (None, _number, "a finite number"),
    "lora_dropout": (0.0, lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "rank_pattern": (None, lambda v: _by_pattern(v, _rank), "whole numbers above 0 by patterns of module names"),
    "alpha_pattern": (None, lambda v: _by_pattern(v, _number), "finite numbers by patterns of module names"),
    "target_modules": (None, _names, "a regular expression or a list of module names"),
    "exclude_modules": ([], lambda v: v is None or _names(v), "a regular expression or a list of module names"),
    "layers_to_transform": (None, lambda v: v is None or _whole(v) or _all(v, _whole), "numbers of layers"),
    "layers_pattern": (None, lambda v: v is None or _regex(v) or _all(v, _regex), "names of stacks of layers"),
    "modules_to_save": (None, lambda v: v is None or _all(v, _name), "a list of module names"),
    "ensure_weight_tying": (False, lambda v: isinstance(v, bool), "True or False"),
    "base_model_name_or_path": (None, _text, "a name"),
}


#: The longest time of the patterns on the name of a module.
_SECONDS = 2


class Names(NamedTuple):
    """A choice of modules: a regular expression for whole names, or the ends of names."""

    pattern: str | None
    ends: tuple[str, ...]

    @classmethod
    def read(cls, value: str | list[str] | None) -> "Names":
        if isinstance(value, str):
            # PEFT's shorthand does not stand for the unembedding.
            return cls(r"(?!lm_head$).*" if value.lower() == "all-linear" else value, ())
        return cls(None, tuple(value or ()))

    def have(self, module: str) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, module) is not None
        return any(f".{module}".endswith(f".{end}") for end in self.ends)


def _bounded(read: Callable[["PeftConfig", str], Any]) -> Callable[["PeftConfig", str], Any]:
    """A method that reads patterns of module names, with a bound: some patterns would take years."""

    @functools.wraps(read)
    def wrapped(self: "PeftConfig", module: str) -> Any:
        try:
            with time_limit(_SECONDS):
                return read(self, module)
        except TimeoutError:
            raise UserError(f"{self.where}: a pattern of module names does not end on {module}: simplify it") from None

    return wrapped


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """An ``adapter_config.json``. Modules have the names that they had when the adapter was saved.

    ranks, alphas: pattern -> rank or alpha, instead of ``r`` and ``alpha``, of the modules whose name ends with a match
    of it. The first pattern that fits decides.
    layers, stacks: only modules in the layers with these numbers, of the stacks with these names; () for all.
    dora: whether it is DoRA (:class:`interventions.kinds.lora.LoRA`).
    whole: the ends of the names of modules that are saved whole, instead of a change of them. tied: a module that
    shares its tensor with one of these gets the saved tensor too.
    base, base_class: name and class of the model on which it was trained; None if the file does not tell.
    """

    where: Path
    r: int
    alpha: float
    dropout: float
    rank_stabilised: bool
    dora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: Names
    excluded: Names
    layers: tuple[int, ...]
    stacks: tuple[str, ...]
    whole: tuple[str, ...]
    tied: bool
    base: str | None
    base_class: str | None

    @_bounded
    def rank(self, module: str) -> int:
        return _first(self.ranks, module, self.r)

    @_bounded
    def scale(self, module: str) -> float:
        """The factor of the output: alpha / r, or if it is rank-stabilised (Kalajdzievski 2023), alpha / sqrt(r)."""
        rank = self.rank(module)
        return _first(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether this module, or one around it, is saved whole. PEFT compares ends of names, not whole parts."""
        parts = module.split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(self.whole) for name in around)

    @_bounded
    def adapts(self, module: str) -> bool:
        """Whether PEFT gives this linear an adapter."""
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.whole):
            return False
        if self.excluded.have(module) or not self.targets.have(module):
            return False
        if not self.layers or module in self.targets.ends:  # a whole name is not a matter of layers
            return True
        stacks = "|".join(self.stacks) or r"[^.]*"
        number = re.match(rf"(?:.*?\.)?(?:{stacks})\.(\d+)\.", module)
        return number is not None and int(number[1]) in self.layers


def _first(patterns: dict[str, Any], module: str, default: Any) -> Any:
    fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the ``adapter_config.json`` of a folder.

    Raises:
        UserError: for an option with which PEFT does not compute LoRA or DoRA, or a value that cannot be used.
    """
    where = folder / "adapter_config.json"
    if not where.is_file():
        raise UserError(f"{folder} is not a PEFT folder, because it has no {where.name}: name a folder that has")
    options = {"peft_type": None, **read_json(where)}
    for option, value in options.items():
        if option not in _FREE and option not in _READ and value not in _PLAIN.get(option, _OFF):
            raise _refused(where, option, value)
    for option, (default, check, what) in _READ.items():
        value = options.setdefault(option, default)
        if not check(value):
            raise UserError(f"{where}: {option} = {_short(value)} must be {what}: save the adapter again")
    layers, stacks, mapping = (options.get(o) for o in ("layers_to_transform", "layers_pattern", "auto_mapping"))
    base_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return PeftConfig(
        where=where,
        r=options["r"],
        alpha=options["lora_alpha"],
        dropout=options["lora_dropout"],
        rank_stabilised=bool(options.get("use_rslora")),
        dora=bool(options.get("use_dora")),
        ranks=options["rank_pattern"] or {},
        alphas=options["alpha_pattern"] or {},
        targets=Names.read(options["target_modules"]),
        excluded=Names.read(options["exclude_modules"]),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        stacks=(stacks,) if isinstance(stacks, str) else tuple(stacks or ()),
        whole=tuple(options["modules_to_save"] or ()),
        tied=options["ensure_weight_tying"],
        base=options["base_model_name_or_path"],
        base_class=base_class if isinstance(base_class, str) else None,
    )


def _refused(where: Path, option: str, value: Any) -> UserError:
    known = ", ".join(map(repr, _PLAIN[option])) if option in _PLAIN else "None or False"
    what = _ADVICE.get(option, f"{MERGE}, or train it without this option")
    return UserError(f"{where}: {option} = {_short(value)} is not supported, only {known}: {what}")


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."
