"""The options of P1's study of Registering."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.loop import LoopOptions
from train.study.registering.recipes import CONDITIONS, Condition
from vlm_jax.data.miniworld import TASKS
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, RATE, Range

_QUESTIONS = tuple(name for name, task in TASKS.items() if task.family)


@dataclasses.dataclass(frozen=True)
class Args(LoopOptions, DataOptions, ModelOptions):
    """Ask what costs Registering its accuracy (P1, section 4): the method, the number of registers, or the training
    data.

    Compares the whole model, pictures reduced without training, plain tuning, and registers: three numbers of them,
    trained on captions alone as in the paper, on questions, and on both; and other masks. Each training has as many
    examples and steps as any other.
    """

    recipe: Literal["p1"] = "p1"
    """The study to run. Each has options of its own: --recipe NAME --help shows them."""
    captions: str = "mini-caption"
    """Task with captions to train on."""
    questions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = _QUESTIONS
    """Tasks with questions, to train on (their training splits) and to score on (their test splits)."""
    limit: Annotated[int, Range(least=1)] = 1200
    """Number of training examples in every condition."""
    eval_limit: Annotated[int, Range(least=1)] = 100
    """Number of held-out examples of each task."""
    epochs: Annotated[int, Range(least=1)] = 3
    """Number of passes over the training examples."""
    batch: Annotated[int, BATCH] = 16
    """Training examples in a step."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of AdamW. By default 5e-5 x 2560 / WIDTH, where WIDTH is the model's hidden size: higher than
    in train.register, because a short training has to show what registers can learn."""
    seeds: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="SEED [SEED ...]")] = (0, 1)
    """Seeds of the trainings. Every condition is trained with each of them."""
    conditions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Only these conditions, and those with which they are compared."""
    layer: Annotated[int, Range(least=0)] = 1
    """The layer in which the most attended visual tokens are found. Later layers see no others."""
    answer_batch: Annotated[int, Range(least=1)] = 50
    """Questions that are answered together."""
    max_new_tokens: Annotated[int, Range(least=1)] = 12
    """Largest number of tokens in an answer."""
    out: Path = Path("runs/registering")
    """Folder for the results. A stopped study with the same options continues there."""

    def chosen(self) -> list[Condition]:
        """The conditions to run, in the recipe's order.

        Raises:
            UserError: for an unknown condition, or for seeds that are missing or repeated.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds needs at least one number, and none twice: correct it")
        if self.limit < 2 * len(self.questions):
            raise UserError(
                f"--limit is {self.limit}: give at least {2 * len(self.questions)}, because half of the examples "
                "of one training are captions, and the tasks share the others"
            )
        names = [condition.name for condition in CONDITIONS]
        for name in self.conditions:
            if name not in names:
                raise UserError(f"recipe p1 has no condition {name!r}{nearest(name, names)}")
        wanted = [c for c in CONDITIONS if not self.conditions or c.name in self.conditions]
        needed = {compared_with(c) for c in wanted} | set(wanted)
        return [c for c in CONDITIONS if c in needed]


def compared_with(condition: Condition) -> Condition:
    """The condition that shows what this one loses: plain tuning on the same data or, without training, the whole
    model."""
    return next(c for c in CONDITIONS if c.data == condition.data and c.registers is None and c.reduced is None)
