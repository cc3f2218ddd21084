"""One training step: gradients of the trained leaves, the optimiser's update, and the counters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from train.subsets import Rest
from vlm_jax.errors import UserError

#: ``loss(params, batch, key)`` returns the loss, or ``(loss, metrics)``, where ``metrics`` are named numbers for the
#: log. With counters it is ``loss(params, batch, key, counters)`` and returns ``(loss, metrics, counters)``. The loss
#: is a scalar, or has shape ``(members,)`` if several members are trained side by side.
Loss = Callable[..., Any]
#: Names that the log uses itself. A loss must not return metrics with these names.
_RESERVED = ("loss", "losses", "grad_norm", "alive")


class State(NamedTuple):
    """The arrays that a step changes."""

    trained: dict[str, jax.Array]
    """Path -> trained leaf."""
    opt_state: Any
    """The optimiser's state."""
    counters: Any = None
    """Arrays that the loss updates, without gradients."""
    alive: Bool[Array, " members"] | None = None
    """Which members are still trained; None if there are no members."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The functions and settings of a compiled step (see :func:`train.loop.fit`). Equal steps share one program.

    ``places``: the sharding of each leaf of the state; None without a mesh."""

    loss: Loss
    tx: optax.GradientTransformation
    project: Callable[[Any], Any] | None = None
    members: int | None = None
    places: tuple | None = None

    def begin(self, trained: dict[str, jax.Array], counters: Any = None) -> State:
        """The state before the first step. Its arrays are copies, because :func:`update` overwrites them.

        Raises:
            UserError: if a trained leaf does not have one entry for each member.
        """
        trained, counters = jax.tree.map(jnp.copy, (trained, counters))
        if self.members is None:
            return State(trained, self.tx.init(trained), counters)
        for path, leaf in trained.items():
            if leaf.shape[:1] != (self.members,):
                raise UserError(
                    f"{path} has shape {leaf.shape}: give it a first axis of {self.members}, one entry for each member"
                )
        return State(trained, jax.vmap(self.tx.init)(trained), counters, jnp.ones(self.members, bool))

    def evaluate(self, params: Any, batch, key: jax.Array, counters: Any) -> tuple[jax.Array, dict, Any]:
        """The loss, its metrics ({} if it returns none) and the new counters.

        Raises:
            UserError: if the loss has a wrong shape, or a metric has a name that the log uses itself.
        """
        metrics = {}
        if counters is not None:
            losses, metrics, counters = self.loss(params, batch, key, counters)
        else:
            losses = self.loss(params, batch, key)
            if isinstance(losses, tuple):
                losses, metrics = losses
        wanted = () if self.members is None else (self.members,)
        if jnp.shape(losses) != wanted:
            raise UserError(f"the loss has shape {jnp.shape(losses)} where {wanted} is needed: sum it or set members")
        if taken := sorted(set(metrics) & set(_RESERVED)):
            raise UserError(f"the loss returns a metric {taken[0]!r}, a name that the log uses itself: rename it")
        return losses, metrics, counters


@functools.partial(jax.jit, static_argnames="step", donate_argnames="state")
def update(state: State, rest: Rest, batch, key: jax.Array, *, step: Step) -> tuple[State, dict]:
    """The state after one step, and the metrics of the step.

    Args:
        batch: arrays whose leading axis is the micro-batches. Gradients and metrics are averaged over them.
    """
    grads, counters, (losses, metrics) = _gradients(state, rest, batch, key, step)
    advance = functools.partial(_advance, step.tx)
    if step.members is not None:
        advance = jax.vmap(advance)  # each member has its own optimiser, so clipping one member does not change another
    trained, opt_state, norm = advance(grads, state.opt_state, state.trained)
    if step.project is not None:
        trained = rest.trained_of(step.project(rest.joined(trained)))
    alive = state.alive
    metrics = {"loss": losses, "grad_norm": norm, **metrics}
    if alive is not None:
        alive = alive & jnp.isfinite(losses) & jnp.isfinite(norm)
        trained, opt_state = jax.vmap(_chosen)(alive, (trained, opt_state), (state.trained, state.opt_state))
        count = jnp.maximum(alive.sum(), 1)
        means = {name: jnp.where(alive, metrics[name], 0).sum() / count for name in ("loss", "grad_norm")}
        metrics |= {**means, "losses": losses, "alive": alive}
    state = State(trained, opt_state, counters, alive)
    if step.places is not None:  # with another sharding, the next step would have to be compiled again
        leaves, structure = jax.tree.flatten(state)
        state = structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, step.places))
    return state, metrics


def step_bytes(state: State, rest: Rest, batch, key: jax.Array, *, step: Step) -> int:
    """The memory, in bytes on one device, of a compiled :func:`update`: its arguments, its results, and what it needs
    in between. It compiles the step again, or reads it from the cache of compiled programs."""
    memory = update.lower(state, rest, batch, key, step=step).compile().memory_analysis()
    assert memory is not None, "every backend of JAX states the memory of its programs"
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def _gradients(state: State, rest: Rest, batch, key: jax.Array, step: Step) -> tuple[dict, Any, tuple]:
    """Gradients of the trained leaves, new counters, and ``(losses, metrics)``, from all micro-batches."""
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(key, count)

    def one(counters, micro, key):
        def total(trained):
            losses, metrics, after = step.evaluate(rest.joined(trained), micro, key, counters)
            return losses.sum(), (after, (losses, metrics))

        (_, (after, outcome)), grads = jax.value_and_grad(total, has_aux=True)(state.trained)
        return grads, after, outcome

    if count == 1:  # without a sum of gradients, which would need as much memory as the gradients
        return one(state.counters, jax.tree.map(lambda a: a[0], batch), keys[0])

    def accumulate(carry, scanned):
        total, counters = carry
        grads, counters, outcome = one(counters, *scanned)
        return (jax.tree.map(jnp.add, total, grads), counters), outcome

    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    (grads, counters), outcomes = jax.lax.scan(accumulate, (zeros, state.counters), (batch, keys))
    return jax.tree.map(lambda g: g / count, grads), counters, jax.tree.map(lambda a: a.mean(0), outcomes)


def _advance(tx: optax.GradientTransformation, grads: dict, opt_state, trained: dict) -> tuple[Any, Any, jax.Array]:
    """The trained leaves and the optimiser's state after an update, and the norm of the gradients."""
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, optax.tree.norm(grads)


def _chosen(alive: jax.Array, new, old):
    """One member's arrays: the new ones while it is alive."""
    return jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, old)
