"""Splits that are the same everywhere and share no image: rows are dealt out in an order that a hash decides."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

#: Another seed deals every dataset out anew.
SPLIT_SEED = 0


class SplitRow(NamedTuple):
    """What decides a row's split: which image it is about, and which rows belong together in scoring."""

    number: int
    id: str
    image: str
    group: Hashable


def rank(text: str) -> bytes:
    """A row's or an image's place in the order."""
    return hashlib.sha256(f"{SPLIT_SEED}:{text}".encode()).digest()


def deal(rows: Sequence[SplitRow], sizes: Mapping[str, int], taken: Mapping[str, str]) -> dict[str, list[int]]:
    """Which rows (by number) each split has.

    Images come in hashed order, and each with all its rows goes to the split that lacks most of its size, so that a
    pool which is too small fills all splits in proportion. What overfills a split is left out; a group is never torn.
    Within a split rows are in the hashed order of their ids or groups.

    Args:
        taken: the split that has an image already, out of another pool; rows of such an image go nowhere else.
    """
    images: dict[str, list[SplitRow]] = {}
    for row in rows:
        images.setdefault(row.image, []).append(row)
    dealt: dict[str, list[SplitRow]] = {name: [] for name in sizes}
    for image in sorted(images, key=rank):
        open_ = [name for name in sizes if len(dealt[name]) < sizes[name] and taken.get(image, name) == name]
        if not open_:
            continue
        split = min(open_, key=lambda name: len(dealt[name]) / sizes[name])
        counts = Counter(row.group for row in images[image])
        chosen: set[Hashable] = set()
        room = sizes[split] - len(dealt[split])
        for row in images[image]:
            if row.group not in chosen and counts[row.group] <= room:
                chosen.add(row.group)
                room -= counts[row.group]
        dealt[split] += [row for row in images[image] if row.group in chosen]
    return {
        name: [row.number for row in sorted(part, key=lambda row: (rank(str(row.group)), row.number))]
        for name, part in dealt.items()
    }
