"""The parts of a training: its loss, the order of its examples, learning-rate schedules and optimisers.

Schedules and optimisers are cached: equal arguments give the same object, so that equal trainings share one compiled
step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name
from vlm_jax.errors import UserError
from vlm_jax.prompts import Fitted
from vlm_jax.runs.ranges import Range
from vlm_jax.sites import Intervention
from vlm_jax.typing import ArrayLike

#: The default learning rates are for models of this width, which is that of P0's Qwen3-VL-4B.
_WIDTH = 2560


def answer_loss(
    model: Model,
    x: Float[Array, "batch tokens width"],
    index: Int[ArrayLike, "batch answer"],
    valid: Bool[ArrayLike, "batch answer"],
    target: Int[ArrayLike, "batch answer"],
) -> Float[Array, ""]:
    """The mean cross-entropy of the gold tokens, in nats.

    Args:
        x: the last layer's output, before the final norm.
        index: positions of the gold tokens. Each token is predicted from the position before it. Logits are computed
            only at these positions.
        valid: which of the positions count; the others are padding.
        target: the gold tokens.
    """
    before = jnp.maximum(index - 1, 0)[..., None]
    logits = model.unembed(jnp.take_along_axis(x, before, 1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
    return jnp.sum(losses * valid) / jnp.sum(valid)


def prompt_loss(model: Model, batch: Fitted, interventions: tuple[Intervention, ...] = ()) -> Float[Array, ""]:
    """:func:`answer_loss` after a whole forward pass under interventions. To save memory, the backward pass runs layers
    and vision blocks again."""
    inputs = batch.inputs.turned()
    x, _ = model.hidden(inputs, interventions, remat=True)
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)


def model_loss(model: Model, batch: Fitted, key: jax.Array) -> Float[Array, ""]:
    """:func:`prompt_loss` in the form that :func:`train.loop.fit` needs, for training a model's parameters. ``key`` is
    not used."""
    return prompt_loss(model, batch)


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The examples of each step. An epoch reads every example once, in a new random order.

    The last examples of an epoch are left out if they do not fill a step. If there are too few examples for one step,
    they are repeated.
    """

    examples: int
    epochs: int
    batch: int
    """Number of examples in a micro-batch."""
    accumulation: int = 1
    """Number of micro-batches in a step."""
    seed: int = 0

    @property
    def step_size(self) -> int:
        """Number of examples in a step."""
        return self.batch * self.accumulation

    @property
    def per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return max(1, self.examples // self.step_size)

    @property
    def steps(self) -> int:
        return self.per_epoch * self.epochs

    def rows(self, step: int) -> Int[np.ndarray, "accumulation batch"]:
        """The numbers of a step's examples. They depend only on the step, so a stopped training continues with the same
        data."""
        epoch, number = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        order = np.resize(order, self.per_epoch * self.step_size)
        return order.reshape(self.per_epoch, self.accumulation, self.batch)[number]


def scaled_rate(rate: float, width: int, of: int = _WIDTH) -> float:
    """The learning rate for a model of this width, if ``rate`` is right for the width ``of``. The best rate of Adam is
    proportional to 1 / width (muP, Yang et al. 2022)."""
    return rate * of / width


@functools.cache
def linear_decay(peak: float, steps: int) -> optax.Schedule:
    """A learning rate that falls linearly from ``peak`` to 0 (P0, appendix D)."""
    return optax.linear_schedule(peak, 0.0, steps)


@functools.cache
def warmup_linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """A learning rate that rises linearly from 0 to ``peak`` in ``warmup`` steps, then falls linearly to 0 at the last
    step."""
    rise, fall = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, max(1, steps - warmup))
    return optax.join_schedules([rise, fall], [warmup])


@functools.cache
def warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> optax.Schedule:
    """A learning rate that rises linearly from 0 to ``peak`` in ``warmup`` steps, then falls along a cosine to ``end``
    at the last step. It rises in fewer steps if there are no more than ``warmup``."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, steps - 1), steps, end)


@functools.cache
def adamw(
    schedule: optax.Schedule, decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019)."""
    return optax.adamw(schedule, *betas, weight_decay=decay)


@functools.cache
def muon_adamw(schedule: optax.Schedule, decay: float = 0.02) -> optax.GradientTransformation:
    """Muon for the kernels, each layer's matrix by itself, and AdamW for the other parameters. Muon's updates are
    scaled to the size of AdamW's (Liu et al. 2025). ``decay`` is the weight decay of the kernels."""

    def matrices(params):
        def dims(path, leaf):
            return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if leaf_name(path).endswith("kernel") else None

        return jax.tree_util.tree_map_with_path(dims, params)

    return muon(schedule, weight_decay=decay, consistent_rms=0.2, adam_b2=0.98, muon_weight_dimension_numbers=matrices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Learning rates and weight decays for some of the trained parameters, which are named by their labels."""

    label_lr: Annotated[dict[str, float], Range(least=0, most=100)] = dataclasses.field(default_factory=dict)
    """Peak learning rates for the parameters with these labels, instead of --lr: LABEL RATE [LABEL RATE ...], such as
    lora_b 3e-3."""
    label_decay: Annotated[dict[str, float], Range(least=0, most=100)] = dataclasses.field(default_factory=dict)
    """Weight decays for the parameters with these labels: LABEL DECAY [LABEL DECAY ...], such as lora_b 0.01."""

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises a UserError for a label that the training does not have."""
        for flag, values in (("--label-lr", self.label_lr), ("--label-decay", self.label_decay)):
            for label in values:
                if label not in labels:
                    raise UserError(f"{flag} names {label!r}: use a label of this training ({', '.join(labels)})")

    def optimisers(
        self,
        labels: Sequence[str],
        lr: float,
        schedule: Callable[[float], optax.Schedule],
        optimiser: Callable[[optax.Schedule, float], optax.GradientTransformation] = adamw,
        decay: float = 0.0,
    ) -> tuple[dict[str, optax.GradientTransformation], dict[str, optax.Schedule]]:
        """The optimiser and the learning-rate schedule of each label.

        Args:
            lr: the peak learning rate of labels that ``label_lr`` does not name.
            schedule: a function peak learning rate -> schedule.
            optimiser: a function (schedule, weight decay) -> optimiser.
            decay: the weight decay of labels that ``label_decay`` does not name.

        Returns:
            Label -> optimiser, and label -> schedule.

        Raises:
            UserError: see :meth:`check_labels`.
        """
        self.check_labels(labels)
        schedules = {label: schedule(self.label_lr.get(label, lr)) for label in labels}
        decays = {label: self.label_decay.get(label, decay) for label in labels}
        return {label: optimiser(schedules[label], decays[label]) for label in labels}, schedules
