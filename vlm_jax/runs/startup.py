"""The first steps of every command: read the examples, load the model, check that both fit, and open the run folder.

All commands take these steps in the same order. Cheap checks come before the model is loaded. The first file is written
with the first result, so a command that stops with an error before leaves no files.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import load_task, task_label
from vlm_jax.data.example import Example
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.processor import Processor
from vlm_jax.prompts import check_fit, prompt_of
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.pictures import save_pictures
from vlm_jax.runs.running import left_out


class Started(NamedTuple):
    """The open run folder of a command, its model and the model's processor."""

    run: Run
    model: Model
    processor: Processor


def load_examples(name: str, *, split: str, limit: int | None, options: DataOptions) -> list[Example]:
    """The first ``limit`` examples of a task (:func:`vlm_jax.data.load_task`). With ``--skip-bad`` those that cannot be
    read or do not fit the model are left out; :func:`start` writes them to the manifest.

    Raises:
        UserError: without ``--skip-bad`` for the first such example, and with it if none is left.
    """
    if not options.skip_bad:
        return load_task(name, split=split, limit=limit, options=options)
    bad: dict[str, str] = {}
    examples = load_task(name, split=split, limit=limit, options=options, bad=bad)
    if isinstance(options, ModelOptions):
        config, processor = options.load_processor()
        kept = []
        for example in examples:
            try:
                check_fit([example], processor, config)
                kept.append(example)
            except UserError as error:
                bad[example.id] = str(error)
        examples = kept
    if not examples:
        raise UserError(f"{name} has no example that can be used; the first reason: {next(iter(bad.values()))}")
    if bad:
        print(f"{name}: left out {len(bad)} of {len(bad) + len(examples)} examples (manifest.json)", file=sys.stderr)
    left_out().update(bad)
    return examples


def load_tasks(
    names: Sequence[str], *, split: str, limit: int | None, options: DataOptions
) -> dict[str, list[Example]]:
    """The label of each task -> its first ``limit`` examples.

    Raises:
        UserError: if no task is named, or one is named twice; and the errors of :func:`vlm_jax.data.load_task`.
    """
    labels = list(map(task_label, names))
    if not labels or len(set(labels)) < len(labels):
        named = " ".join(names) or "empty"
        raise UserError(f"--task is {named}: give at least one task, each (and each file name) once")
    return {
        label: load_examples(name, split=split, limit=limit, options=options)
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
    shown: Iterable[Example] | None = None,
) -> Started:
    """Loads the model of a command, checks it against the options and the examples, and opens the run folder.

    Args:
        args: the command's options: a :class:`vlm_jax.runs.options.ModelOptions` with a field ``out``.
        examples: all examples that the model will read.
        data: where the examples come from, for the manifest (:func:`vlm_jax.data.source`).
        check: a function that raises a UserError if the options do not suit the model.
        with_answer: whether the gold answers must fit into the model's context too.
        ignored: options that may differ when a run continues.
        shown: the examples of which results tell; their pictures are kept in the run folder. By default all.

    Raises:
        UserError: from any of these steps, such as an example that does not fit the model.
    """
    Run.check(args.out, args, ignored)
    model, processor = args.load()
    check(model)
    examples = list(examples)
    check_fit(examples, processor, model.config, with_answer=with_answer)
    run = Run.open(args.out, args, model.config, processor, ignored=ignored)
    run.pin("data", data, from_the_start=True)
    run.pin("model", fingerprint(model), from_the_start=True)
    if left_out():
        run.pin("left_out", left_out())
    prompts = {prompt_of(e) for e in examples if e.prompt is not None}
    if prompts:  # the options may name a file
        run.pin("prompt", sorted(prompts))
    run.when_begun = functools.partial(save_pictures, examples=examples if shown is None else list(shown))
    return Started(run, model, processor)
