"""A local folder as a task: a parquet or JSON Lines dataset, or an lmms-eval task (its YAML file and its data)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlm_jax.data.catalogue import DATASETS
from vlm_jax.data.hub import Opened, cache_of, open_split, reason
from vlm_jax.data.records import options_of, stated_of
from vlm_jax.data.specs import DatasetSpec
from vlm_jax.data.stated import Row, decide
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import read_text

#: The largest number of characters of a task's YAML file. The parser takes seconds for some megabytes.
_LONGEST_TASK = 100_000
#: Role -> the usual names of its column; the first that the dataset has is used.
_USUAL = {
    "id": ("question_id", "questionId", "id", "index"),
    "question": ("question",),
    "hint": ("hint",),
    "image": ("image", "images", "image_path", "image_file"),
    "image_id": ("image_id",),
    "choices": ("choices", "options"),
    "subtask": ("category", "subtask"),
}


def open_folder(path: str | Path, split: str, *, leave_out: bool = False) -> tuple[str, Opened]:
    """The name of the task in a folder, and its data.

    A folder with one YAML file is an lmms-eval task. Its keys ``dataset_path``, ``dataset_name``, ``test_split`` and
    ``task`` are read; no code is run. ``dataset_path`` is a folder beside the file. It may also be the hub id of a
    known dataset; the folder must then hold a copy of that dataset.

    Any other folder is a dataset in parquet, JSON or JSON Lines. ``split`` is read, or the only split. Columns are
    recognised by their usual names: question, answers or answer, image or images, choices or options, ...

    Args:
        leave_out: whether rows that cannot be read will be left out (``--skip-bad``).

    Raises:
        UserError: for a YAML file that is not such a task, or data without the expected split or columns.
    """
    path = Path(path)
    tasks = sorted(file for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
    if len(tasks) > 1:
        raise UserError(f"{path} holds {len(tasks)} YAML files: leave the one of the task, or name a folder of data")
    if not tasks:
        return path.name, _open(path, None, split, exact=False, leave_out=leave_out)
    task = _read_task(tasks[0])
    for key in ("dataset_path", "test_split"):
        if not isinstance(task.get(key), str):
            raise UserError(f"{tasks[0]} lacks {key}: add it (a task that includes others must be written out)")
    data, name = path / task["dataset_path"], str(task.get("task", path.name))
    known = [spec for spec in DATASETS.values() if task["dataset_path"] in spec.hub_ids]
    known = [spec for spec in known if spec.config == task.get("dataset_name")] or known
    if not data.is_dir():
        if known:
            raise UserError(
                f"{tasks[0]}: there is no copy of {task['dataset_path']} at {data}: put one there, or use the task "
                f"name {known[0].name}"
            )
        raise UserError(f"{tasks[0]}: dataset_path {data} is no folder: give one beside the file")
    if known:
        return name, open_split(known[0], task["test_split"], path, False)
    return name, _open(data, task.get("dataset_name"), task["test_split"], exact=True, leave_out=leave_out)


class _Loader(yaml.SafeLoader):
    """Reads YAML and ignores tags such as ``!function``, so that no code is run. Aliases, which a few lines can unfold
    to any size, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not read")
        return super().compose_node(parent, index)


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read_task(file: Path) -> dict:
    text = read_text(file)
    if len(text) > _LONGEST_TASK:
        raise UserError(f"{file} has {len(text)} characters, more than the {_LONGEST_TASK} of any task: correct it")
    try:
        task = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{file} is nested too deeply for a task: correct it") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not a YAML file ({str(error).splitlines()[0]}): correct it") from None
    if not isinstance(task, dict):
        raise UserError(f"{file} is not a task: write keys such as dataset_path and test_split")
    return task


def _open(path: Path, config: str | None, split: str, *, exact: bool, leave_out: bool) -> Opened:
    import datasets  # takes seconds

    try:
        builder = datasets.load_dataset_builder(str(path), config, cache_dir=cache_of(path))
        if any(kind.__name__ == "Csv" for kind in type(builder).__mro__):
            raise UserError(f"{path} holds CSV, which does not tell texts from numbers: write parquet or JSON Lines")
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:  # datasets and the libraries below it raise errors of many kinds
        raise UserError(
            f"{path} holds no dataset that can be read ({reason(error)}): give parquet or JSON Lines"
        ) from None
    known = list(builder.info.splits or ())
    if split not in known and (exact or len(known) > 1):
        raise UserError(f"unknown split {split!r} of {path}{nearest(split, known)}")
    split = split if split in known else known[0]
    rows = builder.as_dataset(split)
    spec = _recognise(path, rows.features)
    for name in spec.used():
        if isinstance(rows.features[name], datasets.Json):
            raise UserError(f"{path}: the column {name} mixes types, such as texts and lists: give all rows one type")
    if "choices" in spec.columns:
        spec = dataclasses.replace(
            spec, answers=decide(_choice_rows(spec, split, rows, leave_out), leave_out=leave_out)
        )
    return Opened(spec, split, rows, False, rows.features, str(path), None, path)


def _choice_rows(spec: DatasetSpec, split: str, rows: Any, leave_out: bool) -> Iterator[Row]:
    """What the rows say about their choices, without the rows that have none or no answer."""
    columns = rows.select_columns(list(spec.used("choices", "gold")))
    for number, row in enumerate(columns):
        where = f"row {number} of {spec.name}, split {split!r}"
        try:
            options, stated = options_of(spec, row), stated_of(spec, row)
        except (UserError, TypeError) as error:
            if leave_out:
                continue
            raise UserError(f"{where}: {error}") from None
        if options and stated:
            yield Row(where, options, stated)


def _recognise(path: Path, features: Any) -> DatasetSpec:
    """The spec of a user's dataset, by the names of its columns. The form of its answers is decided from its rows."""
    columns = {role: next((n for n in names if n in features), None) for role, names in _USUAL.items()}
    columns = {role: name for role, name in columns.items() if name is not None}
    answer = next((name for name in ("answers", "answer") if name in features), None)
    if "question" not in columns or answer is None:
        raise UserError(
            f"{path} has the columns {', '.join(features)}: a task needs question and answers (or answer), may have "
            f"{', '.join(name for role, names in _USUAL.items() if role != 'question' for name in names)}"
        )
    chosen = "choices" in columns
    columns["gold" if chosen else "answers"] = answer
    return DatasetSpec(
        name=path.name,
        title=path.name,
        hub_ids=(str(path),),
        rows={},
        columns=columns,
        answers="option" if chosen else "texts",
        metric="multiple_choice" if chosen else "exact_match",
        splits={},
        image_folder=".",
    )
