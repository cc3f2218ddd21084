"""Examples of the datasets that are known by name: decides which rows a split has and turns them into examples."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.data.catalogue import DATASETS, FAMILY_TASKS, LMMS_TASKS
from vlm_jax.data.example import Example
from vlm_jax.data.hub import Opened, open_split
from vlm_jax.data.images import lazy_images
from vlm_jax.data.options import DataOptions
from vlm_jax.data.records import GoldAnswers, example_of_row, gold_answers, group_of, image_of, label_of
from vlm_jax.data.specs import ALL, DatasetSpec, split_of
from vlm_jax.data.splits import SplitRow, deal
from vlm_jax.errors import UserError


class Index(NamedTuple):
    """The result of a first pass over a dataset's labelled rows."""

    numbers: dict[str, list[int]]
    """Our split -> the numbers of its rows in the hub's split."""
    images: dict[str, dict[int, str]]
    """The hub's split -> row number -> the name of the row's image."""
    largest_group: int
    """How many rows the largest group has."""
    fingerprint: str
    """A digest of the ids, images, questions and answers of all rows."""


def load_named(
    name: str, split: str, limit: int | None, options: DataOptions, bad: dict[str, str] | None = None
) -> list[Example]:
    """The first ``limit`` examples of a dataset's split, of one of lmms-eval's tasks, or of a family of datasets."""
    if name in FAMILY_TASKS:
        members = [DATASETS[member] for member in FAMILY_TASKS[name]]
        count = min(split_of(spec, split).size for spec in members)
        count = count if limit is None else min(count, -(-limit // len(members)))
        members_examples = [load_named(spec.name, split, count, options, bad) for spec in members]
        return [example for turn in zip(*members_examples, strict=True) for example in turn][:limit]
    if name not in DATASETS or split == ALL:
        spec, hub = _benchmark_split(name)
        return load_rows(_opened(spec, hub, options.data_root, options.stream), name, limit, options, bad)
    return _read_split(DATASETS[name], split, limit, options, bad)


def load_rows(
    opened: Opened, task: str, limit: int | None, options: DataOptions, bad: dict[str, str] | None = None
) -> list[Example]:
    """The first ``limit`` rows that have an answer, as examples, in the dataset's order."""
    examples = list(itertools.islice(_examples(opened, opened.each(images=True), task, options, bad=bad), limit))
    if not examples:
        raise UserError(f"{task}: no row of {opened.resolved} has an answer: choose a split whose answers are public")
    return examples


def dataset_source(name: str, split: str, options: DataOptions) -> dict:
    """Where a name's examples come from, for a run's manifest: hub id or folder, revision, number of rows, and a digest
    of the rows.

    It takes no time after :func:`load_named`, because that function caches the same facts.
    """
    if name in FAMILY_TASKS:
        return {member: dataset_source(member, split, options) for member in FAMILY_TASKS[name]}
    spec, hub = _benchmark_split(name) if name not in DATASETS or split == ALL else (DATASETS[name], None)
    hubs = [hub] if hub else list(dict.fromkeys(part.hub for part in spec.splits.values()))
    opened = [_opened(spec, hub, options.data_root, options.stream) for hub in hubs]
    origin = {
        "dataset": opened[0].resolved,
        "config": spec.config,
        "revision": opened[0].revision,
        "licence": spec.licence,
        "hub_splits": hubs,
    }
    if hub:
        return origin | digest_rows(opened[0])
    index = _index(spec, options.data_root, options.stream)
    return origin | {
        "rows": {hub: len(index.images[hub]) for hub in hubs},
        "splits": {split: len(numbers) for split, numbers in index.numbers.items()},
        "fingerprint": index.fingerprint,
    }


def digest_rows(opened: Opened) -> dict:
    """The number of rows of each split, and a SHA-256 digest of the rows without their images."""
    digest, count = hashlib.sha256(), 0
    for _, row, _ in opened.each(images=False):
        digest.update(json.dumps(row, default=str).encode())
        count += 1
    return {"rows": {opened.split: count}, "fingerprint": digest.hexdigest()}


def _benchmark_split(name: str) -> tuple[DatasetSpec, str]:
    """The dataset of a name, and the hub's split that its benchmark scores."""
    if name in LMMS_TASKS:
        return LMMS_TASKS[name]
    return DATASETS[name], DATASETS[name].splits["test"].hub


def _read_split(
    spec: DatasetSpec, split: str, limit: int | None, options: DataOptions, bad: dict[str, str] | None = None
) -> list[Example]:
    hub, size = split_of(spec, split)
    index = _index(spec, options.data_root, options.stream)
    numbers, wanted = index.numbers[split], size if limit is None else min(limit, size)
    # Groups are never divided, so a split may be smaller than its size by up to one row less than a group.
    if len(numbers) + index.largest_group - 1 < wanted or not numbers:
        raise UserError(
            f"{spec.name} has {len(index.images[hub]):,} labelled rows in its split {hub!r}, which gives "
            f"{len(numbers):,} examples for {split!r} instead of {wanted:,}: ask for fewer (--limit) or get the whole "
            "dataset"
        )
    opened = _opened(spec, hub, options.data_root, options.stream)
    picked = opened.pick(numbers[:wanted])
    return list(_examples(opened, picked, spec.name, options, index.images[hub], bad))


@functools.lru_cache(maxsize=32)
def _opened(spec: DatasetSpec, hub: str, root: Path | None, stream: bool) -> Opened:
    return open_split(spec, hub, root, stream)


@functools.lru_cache(maxsize=16)
def _index(spec: DatasetSpec, root: Path | None, stream: bool) -> Index:
    """Assigns all labelled rows to splits.

    The hub's split that holds ``test`` comes first, so that the test rows do not depend on the training rows.
    """
    hubs = dict.fromkeys(spec.splits[split].hub for split in ("test", "eval", "trace", "train") if split in spec.splits)
    numbers, images, taken, largest_group = {}, {}, {}, 1
    digest = hashlib.sha256()
    for hub in hubs:
        rows = []
        opened = _opened(spec, hub, root, stream)
        # The image files are read only where no column identifies a row's image.
        for number, row, cells in opened.each(images="image_id" not in spec.columns):
            if spec.head is not None and number >= spec.head:
                break
            if (gold := _answers_of(opened, number, row)) is None:
                continue
            label = label_of(spec, row, hub, number)
            image = image_of(spec, row, lazy_images(cells, opened.folder, label), label)
            rows.append(SplitRow(number, label, image, group_of(spec, row) or label))
            facts = [label, image, row, [gold.answers, gold.choices, gold.gold]]
            digest.update(json.dumps(facts, default=str).encode())
        sizes = {split: part.size for split, part in spec.splits.items() if part.hub == hub}
        dealt = deal(rows, sizes, taken)
        images[hub] = {row.number: row.image for row in rows}
        taken |= {images[hub][number]: split for split, part in dealt.items() for number in part}
        numbers |= dealt
        largest_group = max([largest_group, *Counter(row.group for row in rows).values()])
    return Index(numbers, images, largest_group, digest.hexdigest())


def _answers_of(opened: Opened, number: int, row: dict) -> GoldAnswers | None:
    """The gold answers of a row; None if the row has none and its dataset allows to leave such rows out."""
    spec = opened.spec
    names = getattr(opened.features.get(spec.columns.get("gold", "")), "names", None)
    try:
        gold = gold_answers(spec, row, names)
    except UserError as error:
        raise UserError(f"row {number} of {opened.resolved}, split {opened.split!r}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        known = "its schema has changed; pin an older revision in a local copy (--data-root)"
        raise UserError(
            f"row {number} of {opened.resolved}, split {opened.split!r}, cannot be read as {spec.name} ({error!r}): "
            + (known if spec.splits else "correct it")
        ) from None
    if gold.answers and gold.answers[0].strip():
        return gold
    if spec.skip_unanswered:
        return None
    raise UserError(
        f"row {number} of {opened.resolved}, split {opened.split!r}, has no answer (withheld, or the file is damaged): "
        "choose a split whose answers are public"
    )


def _examples(
    opened: Opened,
    rows,
    task: str,
    options: DataOptions,
    images: dict[int, str] | None = None,
    bad: dict[str, str] | None = None,
) -> Iterator[Example]:
    """The examples of rows that have an answer. With ``bad`` every image is decoded, and rows that cannot be read are
    listed there and left out."""
    seen: set[str] = set()
    for number, row, cells in rows:
        where = f"row {number} of {opened.resolved}, split {opened.split!r}"
        try:
            if (gold := _answers_of(opened, number, row)) is None:
                continue
            label = label_of(opened.spec, row, opened.split, number)
            if label in seen:
                raise UserError(f"an earlier row has its id {label!r}: give each row its own")
            seen.add(label)
            files = lazy_images(cells, opened.folder, label)
            image = images[number] if images else image_of(opened.spec, row, files, label)
            made: dict[str, Any] = {"label": label, "image": image, "choices": options.choices, "task": task}
            example = example_of_row(opened.spec, row, files, gold, **made)
            if bad is not None:
                list(example.images)
        except UserError as error:
            reason = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if bad is None:
                raise UserError(reason) from None
            bad[where] = reason
            continue
        yield example
