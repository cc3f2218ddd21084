"""FLOPs of the matmuls in a traced program."""

import numpy as np


def matmul_flops(jaxpr, times: int = 1) -> int:
    """Floating-point operations of the matmuls in a jaxpr. A scan counts as often as it runs; of a choice, the branch
    with more FLOPs counts."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = [equation.invars[0].aval.shape[i] for i in equation.params["dimension_numbers"][0][0]]
            total += times * 2 * int(np.prod(contracted)) * int(np.prod(equation.outvars[0].aval.shape))
        inner = [
            getattr(part, "jaxpr", part)
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        counts = [matmul_flops(part, times * equation.params.get("length", 1)) for part in inner]
        total += max(counts, default=0) if equation.primitive.name == "cond" else sum(counts)
    return total
