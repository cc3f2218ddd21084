"""Examples to work on: the built-in miniworld tasks by name, or a user's own JSON Lines file by path."""

import pathlib

from vlm_jax.data.example import FAMILIES, Example
from vlm_jax.data.jsonl import read_jsonl
from vlm_jax.data.miniworld import SPLIT_SIZES, TASKS, make_example
from vlm_jax.errors import UserError, nearest

__all__ = ["Example", "load_task", "task_names"]


def task_names() -> list[str]:
    """The built-in tasks, then the families, each of which stands for its tasks in turn."""
    return [*TASKS, *FAMILIES]


def load_task(name_or_path: str | pathlib.Path, *, split: str = "eval", limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples (all by default) of a task, a family or a JSON Lines file.

    A family takes its tasks' examples in turn, and ``limit`` counts them all. A file, known by its
    ending ``.jsonl``, has no splits, so ``split`` is ignored.
    """
    if limit is not None and limit <= 0:
        raise UserError(f"limit is {limit}: ask for at least one example")
    if str(name_or_path).endswith(".jsonl"):
        return read_jsonl(name_or_path)[:limit]
    name = str(name_or_path)
    if name not in task_names():
        raise UserError(f"unknown task {name!r}{nearest(name, task_names())} (or give the path of a .jsonl file)")
    if split not in SPLIT_SIZES:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLIT_SIZES)}")
    tasks = [task.name for task in TASKS.values() if name in (task.name, task.family)]
    count = len(tasks) * SPLIT_SIZES[split]
    places = range(count if limit is None else min(limit, count))
    return [make_example(tasks[i % len(tasks)], split, i // len(tasks)) for i in places]
