"""Reads and checks the metrics of several steps together. Reading a metric waits until the device has computed it, so
reading at every step would make training slower."""

import sys
from collections.abc import Callable

import numpy as np

from train.meter import About
from vlm_jax.errors import UserError
from vlm_jax.runs.processes import is_first
from vlm_jax.typing import ArrayLike

_ADVICE = "lower the learning rate or look at the examples"


class Readings:
    """Collects the metrics of steps on the device, and reads and checks them later.

    Members are trainings that run side by side (:func:`train.loop.fit`).

    Args:
        name: the name of the training, for messages.
        about: facts about the training. Its function ``ids`` gives the ids of the examples of a step, for messages.
        latest: a function that returns the step of the last checkpoint, or None if there is no checkpoint.
        alive: for each member, whether it is still trained; None if there are no members.
    """

    def __init__(self, name: str, about: About, latest: Callable[[], int | None], alive: ArrayLike | None = None):
        self.name, self.about, self.latest = name, about, latest
        self.alive = None if alive is None else np.asarray(alive)
        self.unread: list[tuple[int, dict]] = []

    def add(self, step: int, metrics: dict) -> None:
        """Adds the metrics of the ``step``-th step to those to be read. The first step is 1."""
        self.unread.append((step, metrics))

    def read(self) -> dict:
        """Checks all steps that were added since the last call, and returns the metrics of the last one ({} if there is
        none). A metric is a number, or a list with a number for each member. ``alive`` is how many members are still
        trained.

        Raises:
            UserError: if the loss or the gradient norm of a step is not a finite number. If there are members, it is
                raised only when no member is left; a member that drops out before is reported on standard error.
        """
        values: dict = {}
        for step, metrics in self.unread:
            values = {name: np.asarray(value) for name, value in metrics.items()}
            self._check(step, values)
        self.unread.clear()
        if "alive" in values:
            values["alive"] = values["alive"].sum()
        return {name: value.tolist() for name, value in values.items()}

    def _check(self, step: int, values: dict[str, np.ndarray]) -> None:
        if self.alive is not None:
            self._check_members(step, values["alive"])
            return
        for name in ("loss", "grad_norm"):
            if not np.isfinite(value := values[name]):
                raise UserError(
                    f"{self.name}: the {name.replace('_', ' ')} is {value} at step {step}{self._examples(step)}: "
                    f"{_ADVICE}{self._kept()}"
                )

    def _check_members(self, step: int, alive: np.ndarray) -> None:
        """Reports the members that dropped out at this step. ``alive``: for each member, whether it is still trained
        after the step."""
        for member in np.flatnonzero(self.alive & ~alive):
            if is_first():
                print(
                    f"{self.name}: the loss or gradient of member {member} is not a number at step {step}"
                    f"{self._examples(step)}: its parameters stay as before this step, {alive.sum()} others go on",
                    file=sys.stderr,
                )
        if not alive.any():
            raise UserError(
                f"{self.name}: no member has a finite loss and gradient any more at step {step}{self._examples(step)}: "
                f"{_ADVICE}{self._kept()}"
            )
        self.alive = alive

    def _examples(self, step: int) -> str:
        """The part of a message that names the examples of a step. ``ids`` counts steps from 0, messages from 1."""
        return "" if self.about.ids is None else f" (examples {', '.join(map(str, self.about.ids(step - 1)))})"

    def _kept(self) -> str:
        """The part of a message that names the last checkpoint; "" if there is none."""
        latest = self.latest()
        return f"; the checkpoint of step {latest} is kept" if latest else ""
