"""What trainings optimise and how fast: the answer loss, the order of examples, schedules, optimisers, rates by label.

Schedules and optimisers are cached: equal arguments give the same object, so that equal trainings share one compiled
step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name
from vlm_jax.errors import UserError
from vlm_jax.prompts import Fitted

#: The width of the models for which learning rates are given: P0's Qwen3-VL-4B.
_WIDTH = 2560


def answer_loss(model: Model, x: jax.Array, index: jax.Array, valid: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens, in nats.

    Args:
        x: the last layer's output ``(B, T, D)``, before the final norm.
        index: positions ``(B, A)`` of the gold tokens. Each is predicted from the position before it, and only these
            positions are unembedded.
        valid: which of the positions count ``(B, A)``; the others are padding.
        target: the gold tokens ``(B, A)``.
    """
    before = jnp.maximum(index - 1, 0)[..., None]
    logits = model.text.logits(model.text.norm(jnp.take_along_axis(x, before, 1)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
    return jnp.sum(losses * valid) / jnp.sum(valid)


def prompt_loss(model: Model, batch: Fitted, interventions: tuple = ()) -> jax.Array:
    """:func:`answer_loss` of a whole forward pass under interventions. The batch's inputs are
    :meth:`vlm_jax.Inputs.turned`. In the backward pass, layers and vision blocks are run again."""
    inputs = batch.inputs.turned()
    x, _ = model.hidden(inputs, interventions, remat=True)
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)


def model_loss(model: Model, batch: Fitted, key: jax.Array) -> jax.Array:
    """:func:`prompt_loss` of a model whose own parameters are trained, for :func:`train.loop.fit`."""
    return prompt_loss(model, batch)


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Which examples each step reads: all of them once an epoch, in a new random order each time.

    Examples that do not fill a step are left out of that epoch. If there are too few for one step, they are repeated.
    """

    examples: int
    epochs: int
    batch: int
    """Examples of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step."""
    seed: int = 0

    @property
    def step_size(self) -> int:
        """Examples of a step."""
        return self.batch * self.accumulation

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return max(1, self.examples // self.step_size)

    @property
    def steps(self) -> int:
        return self.per_epoch * self.epochs

    def rows(self, step: int) -> np.ndarray:
        """The examples of a step ``(accumulation, batch)``: a pure function of the step, so that a stopped training
        goes on with the same data."""
        epoch, number = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        order = np.resize(order, self.per_epoch * self.step_size)
        return order.reshape(self.per_epoch, self.accumulation, self.batch)[number]


def scaled_rate(rate: float, width: int) -> float:
    """The learning rate for a model of ``width``, given the one that suits a width of 2560. Adam's best rate falls as
    1 / width (muP, Yang et al. 2022)."""
    return rate * _WIDTH / width


@functools.cache
def linear(peak: float, steps: int) -> optax.Schedule:
    """From ``peak`` linearly to 0 (P0, appendix D)."""
    return optax.linear_schedule(peak, 0.0, steps)


@functools.cache
def warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> optax.Schedule:
    """From 0 linearly to ``peak`` in ``warmup`` steps, then along a cosine to ``end`` at the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)


@functools.cache
def adamw(schedule: optax.Schedule, decay: float = 0.0) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019)."""
    return optax.adamw(schedule, weight_decay=decay)


@functools.cache
def muon_adamw(schedule: optax.Schedule, decay: float = 0.02) -> optax.GradientTransformation:
    """Muon for the kernels (every layer's matrix by itself), AdamW for the rest; Muon's updates have AdamW's size (Liu
    et al. 2025). ``decay`` is of the kernels."""

    def matrices(params):
        def dims(path, leaf):
            return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if leaf_name(path).endswith("kernel") else None

        return jax.tree_util.tree_map_with_path(dims, params)

    return muon(schedule, weight_decay=decay, consistent_rms=0.2, adam_b2=0.98, muon_weight_dimension_numbers=matrices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Learning rates and weight decays of some of a training's parameters."""

    label_lr: dict[str, float] = dataclasses.field(default_factory=dict)
    """Peak learning rates of some parameters instead of --lr, by label, such as lora_b 3e-3."""
    label_decay: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight decays of some parameters, by label, such as lora_b 0.01."""

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuses labels that the training does not have, and rates and decays below 0."""
        for flag, values in (("--label-lr", self.label_lr), ("--label-decay", self.label_decay)):
            for label, value in values.items():
                if label not in labels:
                    raise UserError(f"{flag} names {label!r}: use a label of this training ({', '.join(labels)})")
                if not (math.isfinite(value) and value >= 0):
                    raise UserError(f"{flag} {label} is {value}: give a number of 0 or more")

    def optimisers(
        self,
        labels: Sequence[str],
        lr: float,
        schedule: Callable[[float], optax.Schedule],
        optimiser: Callable[[optax.Schedule, float], optax.GradientTransformation] = adamw,
        decay: float = 0.0,
    ) -> tuple[dict[str, optax.GradientTransformation], dict[str, optax.Schedule]]:
        """Label -> its optimiser, and label -> its schedule: from the rate and decay given for the label, else from
        ``lr`` and ``decay``.

        Args:
            schedule: peak learning rate -> schedule.
            optimiser: schedule, weight decay -> optimiser.

        Raises:
            UserError: see :meth:`check_labels`.
        """
        self.check_labels(labels)
        schedules = {label: schedule(self.label_lr.get(label, lr)) for label in labels}
        decays = {label: self.label_decay.get(label, decay) for label in labels}
        return {label: optimiser(schedules[label], decays[label]) for label in labels}, schedules
