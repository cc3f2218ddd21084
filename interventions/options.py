"""The option of every command that can run a model under saved interventions."""

import dataclasses
from pathlib import Path

from interventions.store import describe, load_interventions
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.model import Model
from vlm_jax.sites import Intervention


@dataclasses.dataclass(frozen=True)
class InterventionOptions:
    """Saved interventions."""

    intervention: Path | None = None
    """File of saved interventions, which act on the model throughout: editors that train.edit trained, the layer cut
    that interventions.talo wrote, or others."""

    def interventions(self, model: Model) -> tuple[Intervention, ...]:
        """The saved interventions; prints a line for each.

        Raises:
            UserError: for a file that cannot be read, or that was trained with another model.
        """
        if self.intervention is None:
            return ()
        loaded = load_interventions(self.intervention, fingerprint(model))
        for intervention in loaded:
            print(describe(intervention))
        return loaded
