"""The options of P4's study."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from eval.evaluation import AnswerOptions
from eval.judging import MetricOptions
from train.editors import TrainingOptions
from train.mixture import MixtureOptions
from train.study.editing.recipes import RECIPES, Condition
from vlm_jax.data import digits, easy_vqa
from vlm_jax.data.miniworld import TASKS
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range

_MINI = tuple(name for name, task in TASKS.items() if task.family)


@dataclasses.dataclass(frozen=True)
class Args(TrainingOptions, MixtureOptions, MetricOptions, DataOptions, ModelOptions):
    """Compare P4's representation editors (MRT) with parts of themselves, with other sizes and places, and with LoRA
    and full tuning, all trained on the same mixture of tasks for the same number of steps.

    Unless --lr sets one for all, the learning rate of LoRA is P0's, 2e-4 x 2560 / WIDTH, and that of the whole decoder
    a tenth of LoRA's.
    """

    recipe: Literal["p4", "p4-full"] = "p4"
    """The study to run. Each has options of its own: --recipe NAME --help shows them. p4: the conditions that fit into
    an hour on two cores with the embedded models; p4-full: all of the paper's ablations, and every kind of editor."""
    model: str = "mini-llava-align"
    """The model to tune: an embedded model, a Hugging Face folder or a hub id."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = _MINI
    """Tasks to train on, mixed."""
    eval: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = (*_MINI, easy_vqa.NAME, digits.NAME)
    """Tasks to score on; their test splits are used. Tasks that are not in --train show what carries over."""
    eval_limit: Annotated[int, Range(least=1)] = 150
    """Number of held-out examples of each task."""
    seeds: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="SEED [SEED ...]")] = (0, 1)
    """Seeds of the trainings. Every condition is trained with each of them."""
    conditions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Only these conditions of the recipe, besides MRT itself."""
    answering: OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/mrt")
    """Folder for the results. A stopped study with the same options continues there."""

    def chosen(self) -> list[Condition]:
        """The conditions to run, MRT first.

        Raises:
            UserError: for a condition that the recipe lacks, or for seeds that are missing or repeated.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds needs at least one number, and none twice: correct it")
        recipe = RECIPES[self.recipe]
        names = [condition.name for condition in recipe]
        for name in self.conditions:
            if name not in names:
                raise UserError(f"recipe {self.recipe} has no condition {name!r}{nearest(name, names)}")
        return [c for i, c in enumerate(recipe) if i == 0 or not self.conditions or c.name in self.conditions]
