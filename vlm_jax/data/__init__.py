"""Loads the examples of a task: the miniworld, a public dataset by name, or a user's file or folder by path."""

import dataclasses
import hashlib
import pathlib

from vlm_jax.data import catalogue, digits, easy_vqa, loading
from vlm_jax.data.example import TASK_FAMILIES, Example
from vlm_jax.data.folder import open_folder
from vlm_jax.data.jsonl import file_in, read_jsonl
from vlm_jax.data.miniworld import SPLIT_SIZES, TASKS, make_example
from vlm_jax.data.options import DataOptions
from vlm_jax.data.world import WORLD_SEED
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import is_url

__all__ = ["Example", "load_task", "source", "task_label", "task_names"]


def task_names() -> list[str]:
    """All names that :func:`load_task` knows: the miniworld's tasks and families, easy-VQA, digits, P0's families,
    datasets by their plain names, and lmms-eval's tasks."""
    return [*TASKS, *TASK_FAMILIES, easy_vqa.NAME, digits.NAME, *catalogue.names()]


def task_label(name_or_path: str | pathlib.Path) -> str:
    """A short name that can be part of a file name: the task's name, the file's name without its ending, or the
    folder's name."""
    name, path = str(name_or_path), pathlib.Path(name_or_path)
    return name if name in task_names() else path.stem if name.endswith(".jsonl") else path.resolve().name


def load_task(
    name_or_path: str | pathlib.Path,
    *,
    split: str = "eval",
    limit: int | None = None,
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    bad: dict[str, str] | None = None,
) -> list[Example]:
    """The first ``limit`` examples (all by default) of a task, a family, a JSON Lines file or a folder.

    A family gives one example of each of its tasks in turn, and ``limit`` is the total number of examples.

    Args:
        split: trace, train, eval or test. These four are the same on every machine and share no image. For a public
            dataset ``all`` gives the rows that its benchmark scores. lmms-eval's tasks and ``.jsonl`` files have no
            splits, so ``split`` is ignored there. A folder (:mod:`vlm_jax.data.folder`) has its own splits.
        bad: where examples of files, folders and datasets that cannot be read are listed: their place -> the reason.
            They are left out. By default the first of them is an error.

    Raises:
        UserError: for an unknown name or split; a dataset that cannot be reached, whose columns have changed, or that
            has too few rows; a row without an answer; a file or folder that cannot be read.
    """
    if limit is not None and limit <= 0:
        raise UserError(f"limit is {limit}: ask for at least one example")
    name, path = _named(name_or_path)
    if not name.strip():
        raise UserError("the task's name is empty: give a task, a .jsonl file or a folder")
    if is_url(name):
        raise UserError(f"the task {name} is a URL: download it, and name the file or folder")
    return options.shown(_load(name, path, split, limit, options, bad))


def _load(
    name: str, path: pathlib.Path, split: str, limit: int | None, options: DataOptions, bad: dict[str, str] | None
) -> list[Example]:
    """:func:`load_task` without the options' prompt."""
    if name.endswith(".jsonl"):
        return _in_family(read_jsonl(path, bad)[:limit], options.family)
    if name in catalogue.names():
        return loading.load_named(name, split, limit, options, bad)
    if name == easy_vqa.NAME:
        return easy_vqa.load_easy_vqa(split, limit)
    if name == digits.NAME:
        return digits.load_digits(split, limit)
    if name not in (*TASKS, *TASK_FAMILIES):
        if path.is_dir():
            task, opened = open_folder(path, split, leave_out=bad is not None)
            return _in_family(loading.load_rows(opened, task, limit, options, bad), options.family)
        if path.is_file():
            raise UserError(f"{name} is a file, but not a .jsonl file: write one JSON object a line and name it .jsonl")
        raise UserError(
            f"unknown task {name!r}{nearest(name, task_names())} (or give the path of a .jsonl file or a folder)"
        )
    if split not in SPLIT_SIZES:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLIT_SIZES)}")
    tasks = [task.name for task in TASKS.values() if name in (task.name, task.family)]
    count = len(tasks) * SPLIT_SIZES[split]
    count = count if limit is None else min(limit, count)
    return [make_example(tasks[i % len(tasks)], split, i // len(tasks)) for i in range(count)]


def _named(name_or_path: str | pathlib.Path) -> tuple[str, pathlib.Path]:
    """The name of a task, or of the file or folder with it, twice: as text and as a path. A folder of pictures with one
    JSON Lines file beside them stands for the file."""
    name, path = str(name_or_path), pathlib.Path(name_or_path)
    if name.strip() and name not in task_names() and path.is_dir() and (file := file_in(path)) is not None:
        return str(file), file
    return name, path


def _in_family(examples: list[Example], family: str | None) -> list[Example]:
    """The examples, those without a family in the given one."""
    return [e if e.family else dataclasses.replace(e, family=family) for e in examples]


def source(name_or_path: str | pathlib.Path, *, split: str = "eval", options: DataOptions = DataOptions()) -> dict:  # noqa: B008
    """Where :func:`load_task`'s examples come from, for a run's manifest: the dataset that the name resolved to, and
    where they exist its revision, its number of rows and a digest of the rows."""
    name, path = _named(name_or_path)
    if name.endswith(".jsonl"):
        return {"dataset": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if name in catalogue.names():
        return loading.dataset_source(name, split, options)
    if name == easy_vqa.NAME:
        return easy_vqa.easy_vqa_source()
    if name == digits.NAME:
        return digits.digits_source()
    if name in (*TASKS, *TASK_FAMILIES):
        return {"dataset": "miniworld", "seed": WORLD_SEED}
    opened = open_folder(path, split)[1]
    return {"dataset": opened.resolved, **loading.digest_rows(opened)}
