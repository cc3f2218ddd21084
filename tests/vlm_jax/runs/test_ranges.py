"""Numbers outside the range that stands beside their field are refused, with the field's flag."""

import dataclasses
from typing import Annotated

import pytest
import tyro

from vlm_jax.errors import UserError
from vlm_jax.runs.ranges import RATE, Range, check_ranges


@dataclasses.dataclass(frozen=True)
class Inner:
    batch: Annotated[int, Range(least=1), tyro.conf.arg(name="trace-batch")] = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    eval_limit: Annotated[int | None, Range(least=1)] = None
    share: Annotated[float, Range(least=0, below=1)] = 0.0
    scale: Annotated[float, Range(above=0)] = 1.0
    seeds: Annotated[tuple[int, ...], Range(least=0)] = ()
    rates: Annotated[dict[str, float], RATE] = dataclasses.field(default_factory=dict)
    free: int = 0
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_limit": 0}, "--eval-limit is 0: give at least 1"),
        ({"share": 1.0}, "--share is 1.0: give at least 0 and below 1"),
        ({"share": -0.1}, "--share is -0.1: give at least 0 and below 1"),
        ({"scale": 0.0}, "--scale is 0.0: give a number above 0"),
        ({"scale": float("nan")}, "--scale is nan: give a number above 0"),
        ({"scale": float("inf")}, "--scale is inf: give a number above 0"),
        ({"seeds": (1, -2)}, "--seeds is -2: give at least 0"),
        ({"seeds": (1, 2**63)}, "--seeds is 9223372036854775808: give at most 2147483647"),
        ({"rates": {"a": 1.0, "b": 200.0}}, "--rates is 200.0: give at most 100"),
        ({"rates": {"a": -1.0}}, "--rates is -1.0: give a number above 0 and at most 100"),
        ({"inner": Inner(0)}, "--trace-batch is 0: give at least 1"),
    ],
)
def test_refused(changed, message):
    with pytest.raises(UserError) as refused:
        check_ranges(Outer(**changed))
    assert str(refused.value) == message


def test_accepted():
    check_ranges(Outer())
    check_ranges(Outer(eval_limit=1, share=0.999, scale=1e-9, seeds=(0, 3), free=-5, inner=Inner(7)))
