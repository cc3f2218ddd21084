"""The options of P4's study of controllability."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.editors import TrainingOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import RATE, Range


@dataclasses.dataclass(frozen=True)
class Args(TrainingOptions, ModelOptions):
    """For each of several classes e, train editors that turn the answer to "Is the object an e in the image?", and ask
    what else they change (P4, section 4.3).

    First the model learns to answer this question and twenty rewordings of it for all classes. Then editors are trained
    on the fixed question alone, on the visual tokens of the object and the tokens of the instruction. The study asks
    the fixed question, the rewordings, the same about other classes, and other questions, about held-out pictures.
    Three controls: editors on all tokens, on as many random tokens, and with answers dealt out at random.
    """

    recipe: Literal["p4-control"] = "p4-control"
    """The study to run. Each has options of its own: --recipe NAME --help shows them."""
    model: str = "mini-llava"
    """The model. It must have one visual token for each patch, as LLaVA has."""
    tasks: Annotated[tuple[Literal["easy-vqa", "digits"], ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = (
        "easy-vqa",
        "digits",
    )
    """The pictures: easy-vqa has three classes (shapes), of digits five are turned."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the choice of pictures, of the editors' initial arrays and of the trainings' order."""
    limit: Annotated[int, Range(least=2)] = 160
    """Number of pictures to train the editors of a class on. Half of them show the class."""
    eval_limit: Annotated[int, Range(least=2)] = 40
    """Number of held-out pictures for each class. Half of them show it."""
    rank: Annotated[int, Range(least=1)] = 4
    """Rank of the editors, which are in all layers of the decoder."""
    epochs: Annotated[int, Range(least=1)] = 8
    """Number of passes over the pictures of a class."""
    base_examples: Annotated[int, Range(least=1)] = 3000
    """Number of questions with which the model is tuned before."""
    base_epochs: Annotated[int, Range(least=1)] = 3
    """Number of passes over these questions."""
    base_lr: Annotated[float, RATE] = 1e-3
    """Peak learning rate of this tuning, with AdamW, of all parameters."""
    out: Path = Path("runs/control")
    """Folder for the results. A stopped study with the same options continues there."""

    def check_tasks(self) -> None:
        """Raises a UserError for tasks that are missing or repeated."""
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError("--tasks names no task, or one twice: give each once")
