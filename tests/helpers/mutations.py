"""Damage to valid files, for tests that no damage ends in a traceback or in a wrong result."""

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# fmt: off
#: Values that a JSON file can hold where others are expected.
ODD = st.sampled_from(
    [None, True, -1, 0, 2**63, 1e308, float("nan"), float("inf"), "", " ", "nan", "../x", "a\x00b", "\ud800", "x" * 300,
     [], {}, [[]], [None], {"": None}, ["x"], {"answer": "x"}]
)
# fmt: on


def many(count: int) -> settings:
    """Settings for ``count`` examples, the same in every run."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=unhealthy)


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """A file with one to four bytes or stretches changed, removed, put in or repeated."""
    file = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        low = draw(st.integers(0, len(file)))
        high = min(len(file), low + draw(st.integers(1, 40)))
        match draw(st.sampled_from(["change", "remove", "put", "repeat", "cut"])):
            case "change":
                file[low : low + 1] = draw(st.binary(min_size=1, max_size=1))
            case "remove":
                del file[low:high]
            case "put":
                file[low:low] = draw(
                    st.binary(min_size=1, max_size=8) | st.sampled_from([b"[" * 5000, b"9" * 5000, b"\xff"])
                )
            case "repeat":
                file[low:low] = file[low:high]
            case "cut":
                del file[low:]
    return bytes(file)


@st.composite
def damaged_value(draw, value: Any) -> Any:
    """A JSON value in which one part, at any depth, is odd, missing, or under another name."""
    value = json.loads(json.dumps(value))
    part: Any = {"root": value}
    root = part
    key: Any = "root"
    while isinstance(part[key], dict | list) and part[key] and draw(st.integers(0, 3)):
        part = part[key]
        key = draw(st.sampled_from(sorted(part))) if isinstance(part, dict) else draw(st.integers(0, len(part) - 1))
    match draw(st.sampled_from(["odd", "odd", "missing", "renamed"])):
        case "odd":
            part[key] = draw(ODD)
        case "missing" if part is not root:
            del part[key]
        case "renamed" if isinstance(part, dict) and part is not root:
            part[f"{key} "] = part.pop(key)
    return root["root"]
