"""Examples of the datasets that are known by name: which rows a split has, and the examples they become."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlm_jax.data.example import Example
from vlm_jax.data.hub import Opened, open_split
from vlm_jax.data.images import lazy_images
from vlm_jax.data.options import DataOptions
from vlm_jax.data.records import Answered, answered, group_of, image_of, label_of, make_example
from vlm_jax.data.specs import ALL, DATASETS, FAMILY_TASKS, LMMS_TASKS, DatasetSpec, split_of
from vlm_jax.data.splits import Row, deal
from vlm_jax.errors import UserError


class Index(NamedTuple):
    """What is known of a dataset once its labelled rows have been read without their images."""

    numbers: dict[str, list[int]]
    """Our split -> rows of the hub's split."""
    images: dict[str, dict[int, str]]
    """The hub's split -> row -> which image it is about."""
    group: int
    """Rows of the largest group."""
    fingerprint: str
    """A digest of all that was read: ids, images, questions and answers."""


def load(name: str, split: str, limit: int | None, options: DataOptions) -> list[Example]:
    """The first ``limit`` examples of a dataset's split, of a task of lmms-eval's, or of a family of datasets."""
    if name in FAMILY_TASKS:
        members = [DATASETS[member] for member in FAMILY_TASKS[name]]
        count = min(split_of(spec, split).size for spec in members)
        count = count if limit is None else min(count, -(-limit // len(members)))
        parts = [load(spec.name, split, count, options) for spec in members]
        return [example for turn in zip(*parts, strict=True) for example in turn][:limit]
    if name not in DATASETS or split == ALL:
        spec, hub = _whole(name)
        return read_all(_opened(spec, hub, options.data_root, options.stream), name, limit, options)
    return _read_split(DATASETS[name], split, limit, options)


def read_all(opened: Opened, task: str, limit: int | None, options: DataOptions) -> list[Example]:
    """The first ``limit`` rows, in their order."""
    found = list(itertools.islice(_examples(opened, opened.each(images=True), task, options), limit))
    if not found:
        raise UserError(f"{task}: no row of {opened.resolved} has an answer: choose a split whose answers are public")
    return found


def source(name: str, split: str, options: DataOptions) -> dict:
    """What a name resolved to, for a run's manifest: hub id or folder, revision, rows, and a digest of what was read.

    Costs nothing after :func:`load`, which has to know the same.
    """
    if name in FAMILY_TASKS:
        return {member: source(member, split, options) for member in FAMILY_TASKS[name]}
    spec, hub = _whole(name) if name not in DATASETS or split == ALL else (DATASETS[name], None)
    hubs = [hub] if hub else list(dict.fromkeys(part.hub for part in spec.splits.values()))
    opened = [_opened(spec, hub, options.data_root, options.stream) for hub in hubs]
    found = {
        "dataset": opened[0].resolved,
        "config": spec.config,
        "revision": opened[0].revision,
        "licence": spec.licence,
        "hub_splits": hubs,
    }
    if hub:
        return found | contents(opened[0])
    index = _index(spec, options.data_root, options.stream)
    return found | {
        "rows": {hub: len(index.images[hub]) for hub in hubs},
        "splits": {split: len(numbers) for split, numbers in index.numbers.items()},
        "fingerprint": index.fingerprint,
    }


def contents(opened: Opened) -> dict:
    """How many rows there are, and a digest of them without their images."""
    digest, count = hashlib.sha256(), 0
    for _, row, _ in opened.each(images=False):
        digest.update(json.dumps(row, default=str).encode())
        count += 1
    return {"rows": {opened.split: count}, "fingerprint": digest.hexdigest()}


def _whole(name: str) -> tuple[DatasetSpec, str]:
    """The dataset of a name, and the split of the hub that its benchmark scores."""
    if name in LMMS_TASKS:
        return LMMS_TASKS[name]
    return DATASETS[name], DATASETS[name].splits["test"].hub


def _read_split(spec: DatasetSpec, split: str, limit: int | None, options: DataOptions) -> list[Example]:
    hub, size = split_of(spec, split)
    index = _index(spec, options.data_root, options.stream)
    numbers, wanted = index.numbers[split], size if limit is None else min(limit, size)
    # A split of whole groups may lack part of a group to its size.
    if len(numbers) + index.group - 1 < wanted or not numbers:
        raise UserError(
            f"{spec.name} has {len(index.images[hub]):,} labelled rows in its split {hub!r}, which gives "
            f"{len(numbers):,} examples for {split!r} instead of {wanted:,}: ask for fewer (--limit) or get the whole "
            "dataset"
        )
    opened = _opened(spec, hub, options.data_root, options.stream)
    picked = opened.pick(numbers[:wanted])
    return list(_examples(opened, picked, spec.name, options, index.images[hub]))


@functools.lru_cache(maxsize=32)
def _opened(spec: DatasetSpec, hub: str, root: Path | None, stream: bool) -> Opened:
    return open_split(spec, hub, root, stream)


@functools.lru_cache(maxsize=16)
def _index(spec: DatasetSpec, root: Path | None, stream: bool) -> Index:
    """Deals out all labelled rows. Test's pool comes first, so that evaluation is the same whatever is trained on."""
    hubs = dict.fromkeys(spec.splits[split].hub for split in ("test", "eval", "trace", "train") if split in spec.splits)
    numbers, images, taken, group = {}, {}, {}, 1
    digest = hashlib.sha256()
    for hub in hubs:
        rows = []
        opened = _opened(spec, hub, root, stream)
        # Only where nothing says which image a row is about must the files be read.
        for number, row, cells in opened.each(images="image_id" not in spec.columns):
            if spec.head is not None and number >= spec.head:
                break
            if (found := _answered(opened, number, row)) is None:
                continue
            label = label_of(spec, row, hub, number)
            image = image_of(spec, row, lazy_images(cells, opened.folder, label), label)
            rows.append(Row(number, label, image, group_of(spec, row) or label))
            digest.update(json.dumps([label, image, row, found], default=str).encode())
        sizes = {split: part.size for split, part in spec.splits.items() if part.hub == hub}
        dealt = deal(rows, sizes, taken)
        images[hub] = {row.number: row.image for row in rows}
        taken |= {images[hub][number]: split for split, part in dealt.items() for number in part}
        numbers |= dealt
        counts: dict = {}
        for row in rows:
            counts[row.group] = counts.get(row.group, 0) + 1
        group = max([group, *counts.values()])
    return Index(numbers, images, group, digest.hexdigest())


def _answered(opened: Opened, number: int, row: dict) -> Answered | None:
    """What is right in a row; None if the row is to be left out."""
    spec = opened.spec
    names = getattr(opened.features.get(spec.columns.get("gold", "")), "names", None)
    try:
        found = answered(spec, row, names)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"row {number} of {opened.resolved}, split {opened.split!r}, cannot be read as {spec.name} ({error!r}): "
            "its schema has changed; pin an older revision in a local copy (--data-root)"
        ) from None
    if found.answers and all(answer.strip() for answer in found.answers[:1]):
        return found
    if spec.skip_unanswered:
        return None
    raise UserError(
        f"row {number} of {opened.resolved}, split {opened.split!r}, has no answer (withheld, or the file is damaged): "
        "choose a split whose answers are public"
    )


def _examples(opened: Opened, rows, task: str, options: DataOptions, images: dict[int, str] | None = None) -> Iterator:
    for number, row, cells in rows:
        if (found := _answered(opened, number, row)) is None:
            continue
        label = label_of(opened.spec, row, opened.split, number)
        files = lazy_images(cells, opened.folder, label)
        yield make_example(
            opened.spec,
            row,
            files,
            found,
            label=label,
            image=images[number] if images else image_of(opened.spec, row, files, label),
            choices=options.choices,
            task=task,
        )
