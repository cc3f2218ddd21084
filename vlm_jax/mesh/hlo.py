"""What a compiled program exchanges between devices, read from its HLO text as the TPU compiler writes it."""

import functools
import math
import re
import string
from typing import NamedTuple

_COLLECTIVE = re.compile(r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(pred|[a-z]+[0-9]+)[a-z0-9]*\[([0-9,]*)\]")


def _bytes(text: str) -> int:
    """Bytes of all arrays in the text of a type, except for counters (scalar ``u32``)."""
    total = 0
    for kind, shape in _ARRAY.findall(text):
        if kind != "u32" or shape:
            bits = 8 if kind == "pred" else int(kind.lstrip(string.ascii_lowercase))
            total += bits * math.prod(int(size) for size in shape.split(",") if size) // 8
    return total


def _group(line: str) -> int:
    """How many chips exchange data with each other in the collective on this line."""
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([0-9,]+)\}", groups):
        return len(listed.group(1).split(","))
    if tiled := re.match(r"\[(?:[0-9]+,)*([0-9]+)\]<=", groups):
        return int(tiled.group(1))
    if named := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named.group(2)))
    return 2  # a permutation names pairs


def _received(kind: str, size: int, asynchronous: bool, chips: int) -> float:
    """Bytes that each of ``chips`` chips on a ring receives.

    Args:
        size: bytes of the results; for an asynchronous collective (``-start``) of the operands and the results.
    """
    if kind == "all-reduce":  # its asynchronous form names only the results, too
        return size * 2 * (chips - 1) / chips
    if kind == "all-gather":
        return (size * chips / (chips + 1) if asynchronous else size) * (chips - 1) / chips
    if kind == "reduce-scatter":
        return (size / (chips + 1) if asynchronous else size) * (chips - 1)
    result_size = size / 2 if asynchronous else size
    return result_size * (chips - 1) / chips if kind == "all-to-all" else result_size


def _trip_counts(hlo: str) -> dict[str, float]:
    """How often a loop runs whose condition compares its counter with a constant: condition's name -> count."""
    limits: dict[str, float | None] = {}
    constants: dict[str, float] = {}
    name = ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, constants = header.group(2), {}
        elif constant := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = [su]32\S* constant\((\d+)\)", line):
            constants[constant.group(1)] = float(constant.group(2))
        elif limit := re.match(r"\s+ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", line):
            limits[name] = constants.get(limit.group(1))
    return {name: count for name, count in limits.items() if count is not None}


class _Computation(NamedTuple):
    """One computation of a program.

    collectives: channel -> kind and bytes received. calls: the computations it calls, and how often each runs.
    """

    collectives: dict[str, tuple[str, float]]
    calls: list[tuple[str, float | None]]


def _computations(hlo: str, unknown: float | None) -> tuple[dict[str, _Computation], str]:
    """The computations of a program by name, and the name of its entry."""
    computations: dict[str, _Computation] = {}
    loops = _trip_counts(hlo)
    name, entry = "", ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name = header.group(2)
            computations[name] = _Computation({}, [])
            entry = name if header.group(1) else entry
        elif collective := _COLLECTIVE.search(line):
            kind, asynchronous = collective.group(2), bool(collective.group(3))
            # The compiler cuts one collective into pieces that it spreads over other work: they share its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            received = _received(kind, _bytes(collective.group(1)), asynchronous, _group(line))
            computations[name].collectives[channel.group(1) if channel else line] = (kind, received)
        elif " while(" in line:
            condition, body = (re.findall(rf"{part}=%?([\w.\-]+)", line)[0] for part in ("condition", "body"))
            computations[name].calls.append((body, loops.get(condition, unknown)))
        elif name and "-done(" not in line and "-update(" not in line:
            for called in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                computations[name].calls.append((called, 1.0))
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                computations[name].calls.extend((called.strip(" %"), 1.0) for called in branches.group(1).split(","))
    return computations, entry


def collectives(hlo: str, unknown: float | None) -> dict[str, tuple[float, float]]:
    """How often a compiled program communicates, and the bytes that one chip receives: kind -> (times, bytes).

    A loop's body counts as often as the loop runs. All branches of a conditional count.

    Args:
        unknown: how often a loop runs where the program does not say it.

    Raises:
        ValueError: if such a loop communicates and ``unknown`` is None.
    """
    computations, entry = _computations(hlo, unknown)

    @functools.cache
    def total(name: str) -> dict[str, tuple[float, str, float]]:
        """channel -> (times, kind, bytes)"""
        if name not in computations:
            return {}
        computation = computations[name]
        channels = {channel: (1.0, kind, size) for channel, (kind, size) in computation.collectives.items()}
        for called, times in computation.calls:
            inner = total(called)
            if not inner:
                continue
            if times is None:
                raise ValueError(f"the loop {called} communicates, and nothing says how often it runs")
            for channel, (count, kind, size) in inner.items():
                channels[channel] = (times * count, kind, size)
        return channels

    kinds: dict[str, tuple[float, float]] = {}
    for times, kind, size in total(entry).values():
        before = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = before[0] + times, before[1] + times * size
    return dict(sorted(kinds.items()))
