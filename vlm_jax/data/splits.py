"""Assigns rows to splits that are the same on every machine and share no image: a hash decides the order."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

#: Another seed gives other splits of every dataset.
SPLIT_SEED = 0


class SplitRow(NamedTuple):
    """What decides a row's split: the name of its image, and the group of rows that are scored together."""

    number: int
    id: str
    image: str
    group: Hashable


def rank(text: str) -> bytes:
    """The sort key of a row or an image: a SHA-256 hash of its name and the seed."""
    return hashlib.sha256(f"{SPLIT_SEED}:{text}".encode()).digest()


def deal(rows: Sequence[SplitRow], sizes: Mapping[str, int], taken: Mapping[str, str]) -> dict[str, list[int]]:
    """Split -> the numbers of its rows.

    Images are taken in hashed order. Each goes, with all its rows, to the split that is filled least in proportion to
    its size. So if there are too few rows, all splits are short by the same share. Groups that no longer fit into a
    split are left out; a group is never divided. Within a split, rows are in the hashed order of their groups.

    Args:
        sizes: split -> the number of rows that it should have.
        taken: image -> the split that already has it, from another of the hub's splits. Rows of such an image can only
            go to that split.
    """
    images: dict[str, list[SplitRow]] = {}
    for row in rows:
        images.setdefault(row.image, []).append(row)
    splits: dict[str, list[SplitRow]] = {name: [] for name in sizes}
    for image in sorted(images, key=rank):
        unfilled = [name for name in sizes if len(splits[name]) < sizes[name] and taken.get(image, name) == name]
        if not unfilled:
            continue
        split = min(unfilled, key=lambda name: len(splits[name]) / sizes[name])
        counts = Counter(row.group for row in images[image])
        chosen: set[Hashable] = set()
        room = sizes[split] - len(splits[split])
        for row in images[image]:
            if row.group not in chosen and counts[row.group] <= room:
                chosen.add(row.group)
                room -= counts[row.group]
        splits[split] += [row for row in images[image] if row.group in chosen]
    return {
        name: [row.number for row in sorted(members, key=lambda row: (rank(str(row.group)), row.number))]
        for name, members in splits.items()
    }
