"""What every command does first: read the examples, load the model, check that they fit, open the run folder.

The order is the same everywhere. Cheap checks come before the model is loaded. Nothing is written to disk before the
first result, so a refused command leaves no trace.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import load_task, task_label
from vlm_jax.data.example import Example
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.prompts import check_fit
from vlm_jax.runs.folder import Run


class Started(NamedTuple):
    """What a command works with: its open run folder, its model and the model's processor."""

    run: Run
    model: Model
    processor: Any


def load_tasks(
    names: Sequence[str], *, split: str, limit: int | None, options: DataOptions
) -> dict[str, list[Example]]:
    """The first ``limit`` examples of every task, by its label.

    Raises:
        UserError: for no task, or one that is named twice; and as :func:`vlm_jax.data.load_task`.
    """
    labels = list(map(task_label, names))
    if not labels or len(set(labels)) < len(labels):
        named = " ".join(names) or "empty"
        raise UserError(f"--task is {named}: give at least one task, each (and each file name) once")
    return {
        label: load_task(name, split=split, limit=limit, options=options)
        for label, name in zip(labels, names, strict=True)
    }


def start(
    args: Any,
    examples: Iterable[Example],
    data: Any,
    *,
    check: Callable[[Model], Any] = lambda model: None,
    with_answer: bool = True,
    ignored: tuple[str, ...] = (),
) -> Started:
    """Loads the model of a command, checks it against the options and the examples, and opens the run folder.

    Args:
        args: the command's options: a :class:`vlm_jax.runs.options.ModelOptions` with a field ``out``.
        examples: all that the model will see. They are refused where one does not fit it.
        data: where the examples come from, for the manifest (:func:`vlm_jax.data.source`).
        check: refuses options that do not go with the model.
        with_answer: whether the gold answers must fit into the model's context too.
        ignored: options that may change when a run goes on.

    Raises:
        UserError: from any of these steps.
    """
    model, processor = args.load()
    check(model)
    check_fit(list(examples), processor, model.config, with_answer=with_answer)
    run = Run.open(args.out, args, model.config, processor, ignored=ignored)
    run.pin("data", data)
    run.pin("model", fingerprint(model))
    return Started(run, model, processor)
