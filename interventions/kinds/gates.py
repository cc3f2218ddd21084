"""Gates: they scale the output of modules or heads; 0 cuts it."""

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Float

from interventions.kinds.base import OnTokens, beside_heads, kind, option
from interventions.kinds.layers import layer_table
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, head_axis
from vlm_jax.typing import ArrayLike


@kind
class Gate(OnTokens):
    """Scales the values at sites by ``scale[site] (L,)``. A scale of 0 cuts: TaLo's cut (P3) is 0 at one layer's
    attn_out."""

    scale: dict[str, Float[ArrayLike, "*layers"]]

    @classmethod
    def cut(
        cls, depth: int, layers: Iterable[int], modules: Iterable[str] = ("attn",), scale: float = 0.0, **tokens
    ) -> "Gate":
        """Cuts the attention ("attn") or MLP ("mlp") output of some layers. ``tokens``: where, group, new."""
        layers = list(layers)
        return cls({f"text.{module}_out": layer_table(depth, layers, scale, 1.0) for module in modules}, **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.scale)

    def active(self) -> dict[str, jax.Array]:
        return {site: scale != 1 for site, scale in self.scale.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        scale = self.scale[site] if ctx.layer is None else self.scale[site][ctx.layer]
        return self.only(site, value * scale, value, ctx)


@kind
class HeadGate(OnTokens):
    """Scales the outputs of attention heads (``head_out``, before the output projection) by ``scale (L, H)``."""

    scale: Float[ArrayLike, "layers heads"]
    site: str = option(default="text.head_out")

    @classmethod
    def cut(cls, depth: int, count: int, heads: Iterable[tuple[int, int]], scale: float = 0.0) -> "HeadGate":
        """Cuts ``(layer, head)`` pairs of a model with ``depth`` layers of ``count`` heads."""
        scales = np.ones((depth, count), np.float32)
        for layer, head in heads:
            if not (0 <= layer < depth and 0 <= head < count):
                raise UserError(f"there is no head {head} in layer {layer}: {depth} layers have {count} heads each")
            scales[layer, head] = scale
        return cls(scales)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: (self.scale != 1).any(-1)}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        scale = self.scale[ctx.layer]
        if len(scale) != value.shape[head_axis(site)]:
            raise UserError(f"HeadGate is for {len(scale)} heads, but {site} has {value.shape[head_axis(site)]}")
        return self.only(site, value * beside_heads(scale, site, value.ndim), value, ctx)
