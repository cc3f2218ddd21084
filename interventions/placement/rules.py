"""Where LoRA goes. A placement is a function from scores of modules to module names. The decorator :func:`placement`
registers it; use it for a placement of your own too.

A module is named by layer and kind, "L3-attn" or "L7-mlp": attn = q, k, v, o; mlp = gate, up, down. Scores that need
gradients or activations come from :mod:`interventions.placement.scores`, restoration rates from
:mod:`interventions.trace`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from interventions.modules import MODULES, check_k, check_names, module_names, tower_names
from interventions.statistics import normalised
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import parse_json, read_json, read_text


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What placements are chosen from.

    parameters: LoRA parameters of every module, attention and MLP, at rank 1 (:func:`.scores.module_sizes`).
    scores: score -> task family -> the score of every module; higher is more important. ``scores["rr"]`` are
    restoration rates (``RR_mean``).
    tower: the modules are those of the vision tower with ``depth`` blocks, of which there are no scores.
    """

    depth: int
    parameters: Int[np.ndarray, "layers 2"]
    scores: Mapping[str, Mapping[str, Float[np.ndarray, "layers 2"]]] = dataclasses.field(default_factory=dict)
    tower: bool = False

    @property
    def names(self) -> list[str]:
        """All modules."""
        return tower_names(self.depth) if self.tower else module_names(self.depth)

    def of(self, score: str, family: str) -> Float[np.ndarray, "layers 2"]:
        """One score of one family.

        Raises:
            UserError: if the score of this family is not known, or is not a finite number for every module.
        """
        known = self.scores.get(score, {})
        if family not in known:
            has = f"is known only for {' and '.join(sorted(known))}" if known else "was not computed"
            raise UserError(f"score {score!r} {has}: score {family} too")
        values = np.asarray(known[family], float)
        if values.shape != (self.depth, 2) or not np.isfinite(values).all():
            raise UserError(
                f"score {score!r} of {family} has shape {values.shape} or holds NaN: "
                f"give a finite number for each of {self.depth} x 2 modules"
            )
        return values

    def size(self, names: Iterable[str]) -> int:
        """LoRA parameters of these modules at rank 1."""
        sizes = dict(zip(self.names, self.parameters.ravel().tolist(), strict=True))
        return sum(sizes[name] for name in names)


#: ``(scoring, family, k, seed) -> names``
Choose = Callable[["Scoring", str, int, int], list[str]]
Chooser = TypeVar("Chooser", bound=Choose)


@dataclasses.dataclass(frozen=True)
class Placement:
    """One way to choose modules.

    choose: the function that chooses. description, reference: for readers. needs: the score that it reads. seeded:
    whether the choice depends on the seed, so that several should be drawn.
    """

    choose: Choose
    description: str
    reference: str = ""
    needs: str | None = None
    seeded: bool = False


#: All placements by name.
PLACEMENTS: dict[str, Placement] = {}


def placement(
    name: str, description: str, reference: str = "", *, needs: str | None = None, seeded: bool = False
) -> Callable[[Chooser], Chooser]:
    """Registers a function as the placement ``name``; the other arguments are those of :class:`Placement`. Studies name
    the placements that they compare, so a new one does not change them."""

    def register(choose: Chooser) -> Chooser:
        assert name not in PLACEMENTS, f"there is a placement {name!r} already"
        PLACEMENTS[name] = Placement(choose, description, reference, needs, seeded)
        return choose

    return register


def top(score: Num[np.ndarray, "layers 2"], k: int) -> list[str]:
    """The k modules with the highest score, best first; at equal scores, the lower module first."""
    return [module_names(len(score))[i] for i in np.argsort(-score.ravel(), kind="stable")[:k]]


#: Top-k-shared: the k modules with the highest mean RR.
shared = top


def task_diff(rr_mean: Num[np.ndarray, "layers 2"], other: Num[np.ndarray, "layers 2"], k: int) -> list[str]:
    """The k modules where the normalised RR of this task family exceeds the other's most (Top-k-task-diff)."""
    return top(normalised(rr_mean) - normalised(other), k)


def random_k(depth: int, k: int, seed: int) -> list[str]:
    """k modules, uniformly at random (Random-k)."""
    return _drawn(np.random.default_rng(seed), module_names(depth), k)


def _drawn(rng: np.random.Generator, names: list[str], k: int) -> list[str]:
    return [names[i] for i in sorted(rng.choice(len(names), k, replace=False))]


@placement("all", "every module (LLM-all)", "P0")
def _all(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    return scoring.names


@placement("random", "k modules at random", "P0", seeded=True)
def _random(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    return _drawn(np.random.default_rng(seed), scoring.names, k)


@placement(
    "random_matched", "random modules with as many parameters as task_diff's", "control", needs="rr", seeded=True
)
def _random_matched(scoring: Scoring, family: str, k: int, seed: int, target: str = "task_diff") -> list[str]:
    wanted = scoring.size(choose_modules(target, scoring, family, k, seed))
    chosen = closest_subset(scoring.parameters.ravel(), wanted, np.random.default_rng(seed))
    return [name for name, taken in zip(module_names(scoring.depth), chosen, strict=True) if taken]


@placement(
    "random_stratified", "as many random attentions and MLPs as task_diff has", "control", needs="rr", seeded=True
)
def _random_stratified(scoring: Scoring, family: str, k: int, seed: int, target: str = "task_diff") -> list[str]:
    chosen, names = choose_modules(target, scoring, family, k, seed), module_names(scoring.depth)
    rng, drawn = np.random.default_rng(seed), set()
    for module in MODULES:
        kind = [name for name in names if name.endswith(module)]
        drawn.update(_drawn(rng, kind, sum(name in kind for name in chosen)))
    return [name for name in names if name in drawn]


def closest_subset(
    sizes: Int[np.ndarray, "modules"], wanted: int, rng: np.random.Generator
) -> Bool[np.ndarray, "modules"]:
    """A random subset of the whole numbers ``sizes``. It is drawn uniformly from the non-empty
    subsets whose sum is nearest to ``wanted``."""
    unit = int(np.gcd.reduce(sizes))
    sizes = (np.asarray(sizes) // unit).astype(int)
    # ways[i][s]: how many subsets of the first i have the sum s.
    ways = np.zeros((len(sizes) + 1, sizes.sum() + 1))
    ways[0, 0] = 1
    for i, size in enumerate(sizes):
        ways[i + 1] = ways[i]
        ways[i + 1, size:] += ways[i, : ways.shape[1] - size]
    sums = np.flatnonzero(ways[-1][1:]) + 1
    distance = np.abs(sums * unit - wanted)
    best = sums[distance == distance.min()]
    left = rng.choice(best, p=ways[-1][best] / ways[-1][best].sum())
    taken = np.zeros(len(sizes), bool)
    for i in reversed(range(len(sizes))):
        without = ways[i, left] / ways[i + 1, left]
        taken[i] = rng.random() >= without
        left -= sizes[i] * taken[i]
    return taken


def _by_score(score: str) -> Choose:
    """Chooses the k modules with the highest ``score``."""

    def choose(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
        return top(scoring.of(score, family), k)

    return choose


placement("shared", "the highest mean restoration rate", "P0, section 2.4", needs="rr")(_by_score("rr"))


@placement("task_diff", "the highest normalised RR, less the other family's", "P0, equations 7 and 8", needs="rr")
def _task_diff(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    known = sorted(scoring.scores.get("rr", {}))
    if len(known) != 2 or family not in known:
        has = " and ".join(known) or "no family"
        raise UserError(f"task_diff for {family} compares two families, but rr is known for {has}: trace two of them")
    other = next(name for name in known if name != family)
    return task_diff(scoring.of("rr", family), scoring.of("rr", other), k)


for _name, _description, _reference in (
    ("gradient_norm", "the largest squared gradient of the training loss", "common; form unverified"),
    ("fisher", "the largest trace of the empirical Fisher information", "common; form unverified"),
    ("attribution", "the highest first-order estimate of the RR's numerator", "Nanda 2023"),
    ("page", "the largest gradient of a fresh adapter", "after PAGE, 2605.06183; form derived"),
    ("lora_drop", "the largest output of a trained LoRA", "after LoRA-drop, 2402.07721; form unverified"),
    ("talo", "the modules whose cut costs most accuracy", "P3's vector, and MLPs (ours)"),
):
    placement(_name, _description, _reference, needs=_name)(_by_score(_name))


@placement("first", "the k lowest modules", "control")
def _first(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    return scoring.names[:k]


@placement("middle", "the k modules in the middle", "control")
def _middle(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    begin = (2 * scoring.depth - k) // 2
    return scoring.names[begin : begin + k]


@placement("last", "the k highest modules", "control")
def _last(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
    return scoring.names[-k:]


#: Controls that imitate another placement: "random_matched:fisher" imitates fisher.
IMITATIONS = {"random_matched": _random_matched, "random_stratified": _random_stratified}


def find_placement(name: str) -> Placement:
    """The placement behind a name: one of ``PLACEMENTS``; "random_matched:NAME" or "random_stratified:NAME", which
    imitate NAME instead of task_diff; or a JSON file such as ``["L2-attn", "L7-mlp"]``.

    Raises:
        UserError: for an unknown name.
    """
    base, _, target = name.partition(":")
    if target and base in IMITATIONS:
        control = PLACEMENTS[base]
        description = control.description.replace("task_diff", target)
        choose = functools.partial(IMITATIONS[base], target=target)
        return dataclasses.replace(control, choose=choose, description=description, needs=find_placement(target).needs)
    if name in PLACEMENTS:
        return PLACEMENTS[name]
    if not name.endswith(".json"):
        raise UserError(f"unknown placement {name!r}{nearest(name, PLACEMENTS)} (or give a .json file)")

    def choose(scoring: Scoring, family: str, k: int, seed: int) -> list[str]:
        return read_names(Path(name), scoring.depth, scoring.tower)

    return Placement(choose, f"the modules in {name}")


def choose_modules(name: str, scoring: Scoring, family: str, k: int, seed: int = 0) -> list[str]:
    """The modules that a placement chooses for a task family.

    Args:
        k: the number of modules to choose; "all", "random_matched" and files may choose another number.

    Raises:
        UserError: for an unknown name, a k outside 1 to 2 L, or a score or family that ``scoring`` lacks.
    """
    return find_placement(name).choose(scoring, family, check_k(k, scoring.depth), seed)


def placement_table() -> str:
    """The registry as a Markdown table."""
    rows = [
        f"| `{name}` | {p.description} | {p.needs or '-'} | {'yes' if p.seeded else '-'} | {p.reference} |"
        for name, p in PLACEMENTS.items()
    ]
    return "\n".join(["| placement | chooses | needs the score | seeded | source |", "|---|---|---|---|---|", *rows])


def read_names(path: Path, depth: int, tower: bool = False) -> list[str]:
    """Module names from a JSON file: a list such as ``["L2-attn", "L7-mlp"]``; of a vision tower, ``["V2-attn"]``."""
    text = read_text(path)
    try:
        names = parse_json(text)
    except ValueError as error:
        raise UserError(
            f'placement file {path} cannot be read as JSON ({error}): write a list such as ["L2-attn"]'
        ) from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f'placement file {path} must hold a list of module names such as ["L2-attn", "L7-mlp"]')
    return check_names(names, 0, depth) if tower else check_names(names, depth)


def read_trace(folder: Path, fingerprint: str, depth: int) -> Num[np.ndarray, "layers 2"]:
    """RR of every module, attention and MLP, of a trace's run folder, by the ``--statistic`` of that trace.

    Args:
        depth: the model's number of layers.
        fingerprint: the fingerprint of the model in which LoRA is placed
            (:func:`vlm_jax.checkpoints.fingerprint.fingerprint`).

    Raises:
        UserError: if the folder holds no finished trace, or one of another model.
    """
    summary = read_json(Path(folder) / "summary.json")
    if "rr" not in summary or "fingerprint" not in summary:
        raise UserError(f"{folder}/summary.json lacks rr or fingerprint: trace again into another folder")
    if summary["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} is the trace of another model (fingerprint {summary['fingerprint']}, this one's is "
            f"{fingerprint}): trace this model, or load the one that was traced"
        )
    if summary.get("direction", "restore") != "restore":
        raise UserError(f"{folder} traced how much modules break, not how much they restore: drop --direction break")
    rates, names = summary["rr"], module_names(depth)
    if not isinstance(rates, dict) or sorted(rates) != sorted(names):
        raise UserError(
            f"{folder}/summary.json does not hold one RR for each module of {depth} layers: trace this model's "
            "modules, not heads or groups"
        )
    if not all(isinstance(rates[name], float | int) and math.isfinite(rates[name]) for name in names):
        raise UserError(f"{folder}/summary.json holds an RR that is no finite number: trace again into another folder")
    return np.array([rates[name] for name in names]).reshape(-1, 2)
