"""What the kinds of intervention share: the registry, and how a kind acts on some of the tokens.

A kind is a small frozen pytree with the members of :class:`vlm_jax.sites.Intervention`. All kinds follow three rules.

*Which layers*: an array with one entry per layer. It is either a strength or an int32 **slot table** ``slot (L,)``
(:mod:`interventions.kinds.layers`). At a site outside of the layers, the table is a scalar.

*Which tokens of the prompt*: ``where (B, T)`` bool; or ``group``, the name of a token group, which
:func:`interventions.kinds.groups.bind` looks up in every batch; or all tokens, if neither is given.

*Generated tokens*: a kind without ``where`` and ``group`` acts on them too. With one of these, it does so only if
``new`` is set.

docs/interventions.md ("A kind of your own") shows how to write one.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

from interventions.kinds.groups import tokens_of
from interventions.kinds.layers import sized_slots
from interventions.kinds.packed import short
from vlm_jax.errors import UserError
from vlm_jax.showing import shown
from vlm_jax.sites import Context, Intervention, Stage, head_axis, stage, token_axis
from vlm_jax.typing import ArrayLike

Kind = TypeVar("Kind", bound=type[Intervention])
#: Name in files -> kind; :func:`kind` fills it.
KINDS: dict[str, type[Intervention]] = {}


def option(default: Any = None) -> Any:
    """A static field: part of the compiled program, saved as JSON.

    Name the argument, ``option(default=...)``: type checkers see a positional one as no default.
    """
    return flax.struct.field(pytree_node=False, default=default)


@dataclass_transform(field_specifiers=(flax.struct.field, option))
def kind(cls: Kind) -> Kind:
    """Class decorator: turns a subclass of :class:`vlm_jax.Intervention` into a frozen dataclass and pytree, and
    registers it under its name, so that it can be saved and loaded.

    Fields are arrays, or dicts and tuples of them; static fields are :func:`option`.

    Raises:
        UserError: for a class that is not an intervention, or if another kind has its name. (The same class may be
            defined again, for example when a notebook's cell is run twice.)
    """
    if not issubclass(cls, Intervention):
        raise UserError(f"{cls.__name__} is not an intervention: derive it from vlm_jax.Intervention")
    other = KINDS.get(cls.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(f"the kind {cls.__name__!r} exists in {other.__module__} already: choose another name")
    registered = shown(flax.struct.dataclass(cls))
    registered.__repr__ = short  # a table in a notebook, one line elsewhere
    KINDS[cls.__name__] = registered
    return registered


def beside_tokens(tokens: Bool[ArrayLike, "batch tokens"], site: str, ndim: int) -> jax.Array:
    """``tokens (B, S)`` in the shape that broadcasts against a value with ``ndim`` axes at the site."""
    axis = token_axis(site)
    shape = [1] * ndim
    shape[axis - 1 if site.endswith("deepstack_merger_list") else 0], shape[axis] = tokens.shape
    return tokens.reshape(shape)


def beside_heads(heads: Shaped[ArrayLike, "heads"], site: str, ndim: int) -> jax.Array:
    """``heads (H,)`` in the shape that broadcasts against a value with ``ndim`` axes at the site."""
    shape = [1] * ndim
    shape[head_axis(site)] = -1
    return heads.reshape(shape)


@flax.struct.dataclass(kw_only=True)
class OnTokens(Intervention):
    """The base of kinds that can act on some of the tokens: they return ``self.only(site, changed, value, ctx)``."""

    where: Bool[ArrayLike, "batch tokens"] | None = None
    group: str | None = option(default=None)
    new: bool = option(default=False)

    def tokens(self) -> jax.Array | None:
        return self.where

    def sized(self, depths: Mapping[str, int]) -> Intervention:
        return sized_slots(self, depths) if hasattr(self, "slot") else self

    def bound(self, labels: Int[ArrayLike, "batch tokens"]) -> Intervention:
        """A copy with ``where`` for a batch with these labels ``(B, T)``, if the intervention names a token group."""
        if self.group is None:
            return self
        if vision := sorted(site for site in self.sites if stage(site) is Stage.VISION):
            raise UserError(f"{type(self).__name__} acts on tokens of the prompt, but {vision[0]!r} has none of them")
        where = tokens_of(self.group, np.asarray(labels))
        if not where.any():
            raise UserError(f"{type(self).__name__} acts on the tokens {self.group!r}, but this batch has none")
        return self.replace(where=where)

    def only(self, site: str, changed: jax.Array, value: jax.Array, ctx: Context) -> jax.Array:
        """``changed`` at the tokens that it acts on, ``value`` elsewhere."""
        if self.where is None:
            if self.group is not None:
                raise UserError(f"{type(self).__name__} acts on the tokens {self.group!r}: bind it to a batch first")
            return changed
        marked = ctx.tokens(self.where, value.shape[token_axis(site)], self.new)
        return jnp.where(beside_tokens(marked, site, value.ndim), changed, value)
