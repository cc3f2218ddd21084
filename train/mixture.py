"""Mixtures of tasks to train on."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import tyro

from vlm_jax.data import Example, source
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_tasks


@dataclasses.dataclass(frozen=True)
class MixtureOptions:
    """What a training trains on."""

    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ("mini-docvqa",)
    """Tasks, families, datasets or JSONL files to train on. Several make a mixture."""
    limit: Annotated[int | None, Range(least=1)] = 600
    """Number of training examples, over all tasks. None takes all of every task, without balance."""
    shares: Annotated[tuple[float, ...], Range(above=0), tyro.conf.arg(metavar="SHARE [SHARE ...]")] = ()
    """The share of each task of --train in the mixture, relative to the others. By default all are equal."""

    def mixture(self, options: DataOptions) -> dict[str, list[Example]]:
        """Task -> its training examples.

        Raises:
            UserError: for shares that do not fit the tasks, a limit without an example for each task, or a task that
                has too few examples for its share.
        """
        if not self.train:
            raise UserError("--train is empty: give at least one task")
        counts = divided(self.limit, self.shares, len(self.train))
        mixed: dict[str, list[Example]] = {}
        for name, count in zip(self.train, counts, strict=True):
            ((label, examples),) = load_tasks((name,), split="train", limit=count, options=options).items()
            if label in mixed:
                raise UserError(f"--train names {label} twice: give each task (and each file name) once")
            if count is not None and len(examples) < count:
                raise UserError(
                    f"{name} has {len(examples)} training examples, but its share of --limit {self.limit} is {count}: "
                    "lower --limit or the task's share"
                )
            mixed[label] = examples
        return mixed

    def sources(self, options: DataOptions) -> dict:
        """Where the training examples come from, for the manifest."""
        return {name: source(name, split="train", options=options) for name in self.train}


def divided(limit: int | None, shares: Sequence[float], tasks: int) -> list[int | None]:
    """How many examples each of several tasks gives to a mixture of ``limit`` examples, to which the counts sum up;
    None stands for all of them.

    Raises:
        UserError: see :meth:`MixtureOptions.mixture`.
    """
    if shares and (len(shares) != tasks or not all(np.isfinite(shares)) or min(shares) <= 0):
        raise UserError(f"--shares is {' '.join(map(str, shares))}: give one number above 0 for each of {tasks} tasks")
    if limit is None:
        if shares:
            raise UserError("--shares needs a number of examples: give --limit")
        return [None] * tasks
    if limit < tasks:
        raise UserError(f"--limit is {limit}: give at least one example for each of {tasks} tasks")
    exact = limit * np.asarray(shares or [1.0] * tasks) / sum(shares or [1.0] * tasks)
    # Rounded so that the sum stays: the first ``k`` tasks together get the rounded sum of their exact shares.
    counts = np.diff(np.concatenate([[0], np.round(np.cumsum(exact))])).astype(int)
    if counts.min() < 1:
        raise UserError(f"--limit {limit} leaves no example for {int((counts < 1).sum())} of the tasks: raise it")
    return counts.tolist()
