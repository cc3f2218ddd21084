"""What two runs have in common and where they differ: their options, the scores of their samples, and their maps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.files import parse_json
from vlm_jax.runs.charts import Chart
from vlm_jax.runs.page.reading import Entry, RunFolder

#: ``paired(first, second, clusters=...)`` returns ``difference`` (the first mean minus the second), ``low`` and
#: ``high``, as :func:`interventions.statistics.paired` does. ``clusters`` is None or a label for each sample.
Paired = Callable[..., Mapping[str, Any]]

#: How the two runs are called. The second is compared with the first.
NAMES = ("A", "B")

#: A sample's task and id.
_Sample = tuple[str, str]


class Pair(NamedTuple):
    """The two runs."""

    first: RunFolder
    second: RunFolder


def differing(pair: Pair) -> list[dict]:
    """A row for each option that differs between the runs, and for each fact of their manifests."""
    rows = []
    for where in ("config", "manifest"):
        one, other = (dict(_flat(getattr(folder, where))) for folder in (pair.first, pair.second))
        for name in filter(None, dict.fromkeys([*one, *other])):
            values = [_text(found, name) for found in (one, other)]
            if values[0] != values[1]:
                rows.append({"what": name, **dict(zip(NAMES, values, strict=True))})
    return rows


def scores(pair: Pair, paired: Paired) -> list[dict]:
    """A row for each number that both runs have of the same samples: its means, and the mean difference with its 95 %
    interval. A list of numbers, such as one for each replicate, counts by its mean. Only the samples that both have are
    compared, where both have the number.

    Samples with several lines in a file, such as one for each knock-out, are not compared.

    Samples that show the same picture are one cluster, if the pictures of all of them are kept; else each sample is
    taken to be independent. The column ``clusters`` tells which.
    """
    kept = [_kept(folder) for folder in (pair.first, pair.second)]
    rows = []
    for entry in _both(pair, "samples"):
        one, other = (_samples(folder, entry) for folder in (pair.first, pair.second))
        shared = [sample for sample in one if sample in other and _same(sample, (one, other), kept)]
        for field in dict.fromkeys(field for sample in shared for field in one[sample]):
            numbers = {s: (_number(one[s].get(field)), _number(other[s].get(field))) for s in shared}
            known = {sample: both for sample, both in numbers.items() if None not in both}
            if not known:
                continue
            before, after = zip(*known.values(), strict=True)
            clusters = None
            if all(kept[0].get(sample, {}).get("pictures") for sample in known):
                clusters = _numbered([kept[0][sample]["pictures"][0] for sample in known])
            result = paired(after, before, clusters=clusters)
            several = len(known if clusters is None else set(clusters)) > 1  # of one sample nothing varies
            row = {"file": entry.file, "number": field, "samples": len(known)}
            row |= {"A": sum(before) / len(before), "B": sum(after) / len(after), "B - A": result["difference"]}
            row |= {name: result[name] if several else None for name in ("low", "high")}
            rows.append({**row, "clusters": "none" if clusters is None else "pictures"})
    return rows


def maps(pair: Pair) -> list[tuple[Entry, Chart]]:
    """The difference of each heat map that both runs have: the second's cells minus the first's, where both have the
    cell."""
    found = []
    for entry in _both(pair, "heat_map"):
        first, second = (folder.attempt(entry.file, _chart) for folder in (pair.first, pair.second))
        if first is None or second is None:
            continue
        before = {(row["panel"], row["x"], row["y"]): row["value"] for row in first.rows}
        rows = []
        for row in second.rows:
            old, new = _number(before.get((row["panel"], row["x"], row["y"]))), _number(row["value"])
            if old is not None and new is not None:
                place = {name: row[name] for name in ("panel", "x", "y", "cell") if name in row}
                rows.append({**place, "value": new - old, "A": old, "B": new})
        if rows:
            titles = second.titles
            found.append((entry, Chart(rows, {**titles, "value": f"B - A: {titles.get('value', 'value')}"})))
    return found


def _chart(file: Path) -> Chart:
    chart = Chart(**parse_json(file.read_bytes())["chart"])
    if not all(isinstance(row[axis], str | int | float) for row in chart.rows for axis in ("panel", "x", "y")):
        raise ValueError("its rows have no places")
    if not isinstance(chart.titles, dict):
        raise ValueError("it has no titles")
    if field := chart.missing("heat_map"):
        raise ValueError(f"its rows lack {field}")
    return chart


def _both(pair: Pair, type: str) -> Iterable[Entry]:
    """The entries of a type that both runs have and hold."""
    others = {entry.file for entry in pair.second.entries if entry.type == type}
    for entry in pair.first.entries:
        exists = all((folder.path / entry.file).exists() for folder in (pair.first, pair.second))
        if entry.type == type and entry.file in others and exists:
            yield entry


def _samples(folder: RunFolder, entry: Entry) -> dict[_Sample, dict]:
    """The records of a file by sample. Of a sample that is there twice, none: it is not known which is meant."""
    if entry.file.endswith(".json"):
        content = folder.json(entry.file)
        records = [record for record in content if isinstance(record, dict)] if isinstance(content, list) else []
    else:
        lines = folder.lines(entry.file)
        records = [] if lines is None else lines.records
    found: dict[_Sample, dict | None] = {}
    for record in records:
        sample = (str(record.get("task")), str(record.get("id")))
        found[sample] = record if sample not in found else None
    return {sample: record for sample, record in found.items() if record is not None}


def _kept(folder: RunFolder) -> dict[_Sample, dict]:
    """What is kept of each sample's question and pictures."""
    return {(str(sample.get("task")), sample["id"]): sample for sample in folder.kept()}


def _same(sample: _Sample, records: Sequence[dict[_Sample, dict]], kept: Sequence[dict[_Sample, dict]]) -> bool:
    """Whether two runs mean the same by a sample's name: what they keep of its question and pictures is equal."""
    one, other = (found[sample].get("question") for found in records)
    known = [(found[sample].get("question"), found[sample]["pictures"]) for found in kept if sample in found]
    return one == other and (len(known) < 2 or known[0] == known[1])


def _numbered(names: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _number(value: Any) -> float | None:
    """A finite number, or the mean of a list of them, such as one for each replicate; None for anything else."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, int | float) and abs(one) < 1e300 for one in values):
        return None
    return sum(values) / len(values)


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """The parts of nested objects, under names such as ``data.train``."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _text(values: Mapping[str, Any], name: str) -> str:
    return "not there" if name not in values else str(values[name])
