"""What a compiled program exchanges between devices, read from its text (HLO, as the TPU's compiler writes it)."""

import functools
import math
import re

_COLLECTIVE = re.compile(r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(pred|[a-z]+[0-9]+)[a-z0-9]*\[([0-9,]*)\]")


def _bytes(text: str) -> int:
    """Of all arrays that a type names, but for counters."""
    total = 0
    for kind, shape in _ARRAY.findall(text):
        if kind != "u32" or shape:
            bits = 8 if kind == "pred" else int(re.search(r"[0-9]+", kind).group())
            total += bits * math.prod(int(size) for size in shape.split(",") if size) // 8
    return total


def _group(line: str) -> int:
    """How many chips take part in a collective with each other."""
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([0-9,]+)\}", groups):
        return len(listed.group(1).split(","))
    if tiled := re.match(r"\[(?:[0-9]+,)*([0-9]+)\]<=", groups):
        return int(tiled.group(1))
    if named := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named.group(2)))
    return 2  # a permutation names pairs


def _received(kind: str, size: int, begun: bool, n: int) -> float:
    """Bytes that one of ``n`` chips gets on a ring, where ``size`` is of the results, or with ``begun`` of what goes in
    too."""
    if kind == "all-reduce":  # names its results alone
        return size * 2 * (n - 1) / n
    if kind == "all-gather":
        return (size * n / (n + 1) if begun else size) * (n - 1) / n
    if kind == "reduce-scatter":
        return (size / (n + 1) if begun else size) * (n - 1)
    size = size / 2 if begun else size
    return size * (n - 1) / n if kind == "all-to-all" else size


def _trip_counts(hlo: str) -> dict[str, float]:
    """How often loops run whose condition compares their counter with a constant, by the condition's name."""
    found, constants, name = {}, {}, ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, constants = header.group(2), {}
        elif constant := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = [su]32\S* constant\((\d+)\)", line):
            constants[constant.group(1)] = float(constant.group(2))
        elif limit := re.match(r"\s+ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", line):
            found[name] = constants.get(limit.group(1))
    return {name: count for name, count in found.items() if count is not None}


def collectives(hlo: str, unknown: float | None) -> dict[str, tuple[float, float]]:
    """How often a compiled program communicates, and the bytes that one chip receives: kind -> (times, bytes).

    A loop's body counts as often as it runs: ``unknown`` times where the program does not say how often that is. Of a
    choice all branches count.

    Raises:
        ValueError: for such a loop that communicates, where ``unknown`` is None.
    """
    own: dict[str, dict] = {}
    calls: dict[str, list] = {}
    loops = _trip_counts(hlo)
    name, entry = "", ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name = header.group(2)
            own[name], calls[name] = {}, []
            entry = name if header.group(1) else entry
        elif found := _COLLECTIVE.search(line):
            kind, begun = found.group(2), bool(found.group(3))
            # The compiler cuts one collective into pieces that it spreads over other work: they share its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            own[name][channel.group(1) if channel else line] = (
                kind,
                _received(kind, _bytes(found.group(1)), begun, _group(line)),
            )
        elif " while(" in line:
            condition, body = (re.search(rf"{part}=%?([\w.\-]+)", line).group(1) for part in ("condition", "body"))
            calls[name].append((body, loops.get(condition, unknown)))
        elif name and "-done(" not in line and "-update(" not in line:
            for called in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                calls[name].append((called, 1.0))
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                calls[name] += [(called.strip(" %"), 1.0) for called in branches.group(1).split(",")]

    @functools.cache
    def total(name: str) -> dict[str, tuple[float, str, float]]:
        """channel -> (times, kind, bytes)"""
        found = {channel: (1.0, *what) for channel, what in own.get(name, {}).items()}
        for called, times in calls.get(name, ()):
            inner = total(called)
            if inner and times is None:
                raise ValueError(f"the loop {called} communicates, and nothing says how often it runs")
            found |= {channel: (times * count, *what) for channel, (count, *what) in inner.items()}
        return found

    kinds: dict[str, tuple[float, float]] = {}
    for times, kind, size in total(entry).values():
        before = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = before[0] + times, before[1] + times * size
    return dict(sorted(kinds.items()))
