"""The conditions that P4's study compares, and the numbers that the paper reports."""

import dataclasses
from typing import Literal

from interventions.editing.options import EditorOptions
from interventions.kinds.reft import EDITOR_KINDS

#: The condition that the others are compared with.
FULL = "MRT"
_EDITORS = ("visual", "cross", "prefix", "suffix")


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is trained in one condition, on the same data and for as many steps as in all others.

    section: the part of the table that it belongs to. editors: P4's editors. suffix: the tokens of the suffix editor in
    training (``--suffix`` of train.edit). lora: LoRA in the decoder's linears, in those of the vision tower too, or in
    so few that it has about as many parameters as MRT. decoder: the whole decoder. Without any of these it is the
    unchanged model.
    """

    name: str
    section: str
    editors: EditorOptions | None = None
    suffix: Literal["prompt", "published"] = "prompt"
    lora: Literal["decoder", "decoder and tower", "as large as MRT"] | None = None
    decoder: bool = False


def _editing(section: str, **named: dict) -> list[Condition]:
    return [Condition(name, section, EditorOptions(**options)) for name, options in named.items()]


def _lengths(*lengths: int) -> list[Condition]:
    return _editing("length", **{f"length {length}": {"length": length} for length in lengths})


def _ranks(*pairs: tuple[int, int]) -> list[Condition]:
    return _editing("rank", **{f"ranks {v} / {r}": {"visual_rank": v, "rank": r} for v, r in pairs})


def _depths(*words: str) -> list[Condition]:
    named = {f"{word} layers": {"blocks": (word,), "layers": (word,)} for word in words}
    return _editing("depth", **named)


_METHOD = Condition(FULL, "method", EditorOptions())
_OTHERS = {name: tuple(other for other in _EDITORS if other != name) for name in _EDITORS}
_REMOVED = _editing(
    "without one editor",
    **{f"without {name}": {"editors": _OTHERS[name]} for name in _EDITORS},
)
_ALONE = _editing("one editor alone", **{f"{name} alone": {"editors": (name,)} for name in _EDITORS})
_PUBLISHED = Condition("published suffix", "method", EditorOptions(), suffix="published")
_BASELINES = [
    Condition("zero-shot", "baseline"),
    Condition("LoRA, decoder", "baseline", lora="decoder"),
    Condition("LoRA, decoder and tower", "baseline", lora="decoder and tower"),
    Condition("LoRA as large as MRT", "baseline", lora="as large as MRT"),
    Condition("whole decoder", "baseline", decoder=True),
]
_KINDS = _editing("kind", **{kind: {"kind": kind} for kind in (*EDITOR_KINDS, "MoReS") if kind != "LoReFT"})

RECIPES: dict[str, tuple[Condition, ...]] = {
    "p4": (
        _METHOD,
        _PUBLISHED,
        *_REMOVED,
        *_ALONE,
        *_ranks((2, 2), (8, 8)),
        *_lengths(2, 10),
        *_depths("all"),
        *_BASELINES,
    ),
    "p4-full": (
        _METHOD,
        _PUBLISHED,
        Condition("tied", "method", EditorOptions(tied=True)),
        *_REMOVED,
        *_ALONE,
        *_ranks(*((v, r) for v in (2, 4, 6, 8) for r in (2, 4, 6, 8) if (v, r) != (6, 4))),
        *_lengths(2, 3, 5, 6, 8, 10),
        *_depths("all", "even", "first", "last"),
        *_KINDS,
        *_BASELINES,
    ),
}
"""Recipe -> its conditions."""

REPORTED: dict[str, dict[str, float]] = {
    "MME, perception": {FULL: 1580.40, "MixLoRA": 1509.5, "M2PT": 1504.0, "full tuning": 1587.4},
}
"""The paper's table: LLaVA with CLIP-L and Vicuna-7B tuned on Vision-Flan. Those of other methods follow from the
percentages that it gives."""
