"""How parameters lie on a mesh: logical axes for every parameter, and one rules table from those to mesh axes."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

#: Logical axis -> mesh axis.
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp"}

_INTO_HEADS, _FROM_HEADS = ("embed", "heads"), ("heads", "embed")
_INTO_MLP, _FROM_MLP = ("embed", "mlp"), ("mlp", "embed")
#: The last parts of a parameter's path -> the logical axes of its last dimensions. What is not here is replicated.
AXES = {
    "embed_tokens.weight": ("vocab", "embed"),
    "lm_head.kernel": ("embed", "vocab"),
    **{f"{name}.kernel": _INTO_HEADS for name in ("q_proj", "k_proj", "v_proj", "attn.qkv")},
    **{f"{name}.kernel": _FROM_HEADS for name in ("o_proj", "out_proj", "attn.proj")},
    **{f"{name}.kernel": _INTO_MLP for name in ("gate_proj", "up_proj", "fc1", "mlp.linear_fc1")},
    **{f"{name}.kernel": _FROM_MLP for name in ("down_proj", "fc2", "mlp.linear_fc2")},
}


def sharding(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where the parameter at ``path`` lies. A dimension that its mesh axis does not divide is replicated."""
    axes = next((axes for suffix, axes in AXES.items() if path.endswith(f".{suffix}")), ())
    spec = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(spec) :], axes, strict=True):
        name = RULES[axis]
        spec.append(name if name in mesh.shape and size % mesh.shape[name] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
