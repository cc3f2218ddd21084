"""The options of every command that can run a changed model."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from interventions.kinds.packed import describe, digest
from interventions.placement.adapted import merged
from interventions.store import load_interventions
from vlm_jax.acting import acting
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.runs.folder import Run, digests
from vlm_jax.runs.ranges import Range
from vlm_jax.sites import Intervention


@dataclasses.dataclass(frozen=True)
class StateOptions:
    """The state of the model: as it was loaded, with adapters, or under interventions."""

    adapter: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR [DIR ...]")] = ()
    """Folders of adapters (LoRA or DoRA) in PEFT's format, with or without whole modules. All of them are added to the
    model's weights before anything runs."""
    adapter_weights: Annotated[
        tuple[float, ...], Range(least=-100, most=100), tyro.conf.arg(metavar="WEIGHT [WEIGHT ...]")
    ] = ()
    """By what each adapter is multiplied before they are added up. By default 1."""
    intervention: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """Files of saved interventions, which act on the model throughout, in this order: editors that train.edit trained,
    the layer cut that interventions.talo wrote, or others."""

    def applied(self, run: Run, model: Model, source: str) -> tuple[Model, tuple[Intervention, ...]]:
        """The model with its adapters, and the saved interventions. Both are pinned in the run's manifest; a line is
        printed for each intervention.

        Args:
            source: what the model was loaded from.

        Raises:
            UserError: for a folder or file that cannot be read, or that was trained with another model.
        """
        if self.adapter_weights and not self.adapter:
            raise UserError("--adapter-weights are of the adapters, but --adapter names none: name them")
        own = fingerprint(model)
        loaded = (one for file in self.intervention for one in load_interventions(file, own))
        applied = acting(tuple(loaded), model.depths)
        for intervention in applied:
            print(describe(intervention))
        if self.adapter:
            model = merged(model, self.adapter, self.adapter_weights, source)
            run.pin("adapter", [digests(folder) for folder in self.adapter])
        run.pin("interventions", digest(applied))
        return model, applied
