"""The patches of a trace: which values every cell replaces, and by what."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from interventions.ablations import has_donor, reference_means, resampled
from interventions.engine.grids import ablation_grid, patch_grid
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.engine.variants import Variants
from interventions.kinds.ablation import Ablation, Means
from interventions.kinds.groups import ROLES, label, positions_of
from interventions.modules import MODULE_SITES
from interventions.trace.options import TraceOptions
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches, encode
from vlm_jax.runs.processes import gathered
from vlm_jax.sites import Intervention


class Grid(NamedTuple):
    """The patches of a batch; the shape of their grid: sites, layers, then heads and token groups if there are any; and
    which rows have a token of each group."""

    variants: Variants
    shape: tuple[int, ...]
    present: Bool[np.ndarray, "batch groups"]


class Patches:
    """Makes the patches of each batch of a trace.

    Args:
        examples: all traced samples; with ``--patch resample`` a sample's donor is another one of them.
        reference: the samples whose means ``--patch mean`` takes; None: the traced ones.
        interventions: those that act in every run.

    Raises:
        UserError: for ``--patch resample`` with one sample.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        examples: Sequence[Example],
        options: TraceOptions,
        reference: Sequence[Example] | None = None,
        interventions: Sequence[Intervention] = (),
    ):
        self.model, self.processor, self.examples, self.options = model, processor, examples, options
        self.interventions, self.sites = interventions, ("text.head_out",) if options.heads else tuple(MODULE_SITES)
        self.means: Means | None = None
        if options.patch == "mean":
            others = examples if reference is None else reference
            encoded = batches(others, processor, model.config, options.batch, align=PREFIX_BUCKET)
            self.means = reference_means(model, encoded, self.sites, interventions)
        if options.patch == "resample" and len(examples) < 2:
            raise UserError("--patch resample takes another sample's values, and there is only one: raise --limit")

    def __call__(self, rows: Sequence[int], batch: Batch) -> Grid:
        """The patches of a batch. ``rows`` are the numbers of its examples."""
        options, config = self.options, self.model.config.text
        tokens, present, values = None, np.ones((len(batch.inputs.input_ids), 1), bool), None
        if options.groups != ("all",):
            tokens = [positions_of(group, batch) for group in options.groups]
        if options.patch == "resample":
            donors = self.donors(rows, len(batch.inputs.input_ids))
            values = resampled(self.model, batch, donors, self.sites, self.interventions)
            known = has_donor(batch, donors)
            tokens = [known] if tokens is None else [known & mask for mask in tokens]
        if tokens is not None:
            present = np.stack([mask.any(1) for mask in tokens], 1)
            # A patch must act somewhere. Of a group that no row has, nothing is recorded, so any token will do.
            last = positions_of("last", batch)
            tokens = [mask if mask.any() else last for mask in tokens]
        how: dict[str, Any] = {"window": options.window, "heads": config.num_attention_heads if options.heads else None}
        depth = config.num_hidden_layers
        if options.patch in ("run", "resample"):
            variants, shape = patch_grid(self.sites, depth, **how, tokens=tokens, donor=values)
        else:
            ablation = Ablation.zero(self.sites) if self.means is None else Ablation.by_mean(self.means)
            where = None if tokens is None else np.logical_or.reduce(tokens)
            bound = ablation.replace(where=where).bound(label(batch))
            assert isinstance(bound, Ablation)
            variants, shape = ablation_grid(bound, self.sites, depth, **how, tokens=tokens)
        grouped = options.groups != ("all",)
        return Grid(variants, shape if grouped or tokens is None else shape[:-1], present)

    def donors(self, rows: Sequence[int], size: int) -> Batch:
        """The donors of some examples, filled up to ``size`` rows as their batch is. A sample's donor is another one of
        the examples; which one depends on the seed and their ids, not on their order or batch."""
        chosen = []
        for row in rows:
            own = self.examples[row].id

            def digest(other: Example, own=own) -> bytes:
                return hashlib.sha256(f"{self.options.seed}\0{own}\0{other.id}".encode()).digest()

            chosen.append(min((other for other in self.examples if other.id != own), key=digest))
        return encode(chosen + chosen[-1:] * (size - len(chosen)), self.processor, self.model.config)


class Present:
    """Notes which token groups some row of some batch has."""

    def __init__(self, groups: Sequence[str]):
        self.groups = groups
        self.seen = np.array([group == "all" for group in groups])

    def noted(self, batches: Iterable[tuple[list[int], Batch]]) -> Iterator[tuple[list[int], Batch]]:
        """The same batches."""
        for rows, batch in batches:
            for i in np.flatnonzero(~self.seen).tolist():
                self.seen[i] = positions_of(self.groups[i], batch).any()
            yield rows, batch

    def check(self) -> None:
        """Raises a UserError, in all processes, if no sample has a token of a group. A role may be missing everywhere,
        as subjects of one token have no middle, unless it is the only group."""
        seen = np.any(gathered(self.seen.tolist()), 0)
        for group, has in zip(self.groups, seen, strict=True):
            if not has and (group not in ROLES or len(self.groups) == 1):
                raise UserError(f"--positions {group}: no sample has such a token, choose other groups")
