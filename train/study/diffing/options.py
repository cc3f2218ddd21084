"""The options of P2's study."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interventions.diff.options import FilterOptions
from train.loop import LoopOptions
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range


@dataclasses.dataclass(frozen=True)
class Args(FilterOptions, LoopOptions, DataOptions, ModelOptions):
    """Ask whether stage-wise model diffing finds the features that it promises (P2).

    Dictionaries of a text model are adapted to the vision-language model that grew out of it, and compared with
    controls: the same dictionaries adapted to the text model's own activations, dictionaries trained from random ones,
    and another seed. Features are selected, traced to heads and removed, and compared with what is known about the
    pictures: whether a relation holds in them.
    """

    recipe: Literal["p2"] = "p2"
    """The study to run. Each has options of its own: --recipe NAME --help shows them."""
    model: str = "mini-llava"
    """The vision-language model."""
    text_model: str = "mini-llava-text"
    """The text model from which it grew."""
    task: str = "mini-vsr"
    """Task of the relations: questions with yes or no, whose subtasks are the relations."""
    neutral: str = "mini-vqa"
    """Task of neutral questions, also with yes or no."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")] = (
        "mini-llava-align",
        "mini-llava-half",
    )
    """Earlier stages of the vision-language model, to which the text model's dictionaries are adapted too."""
    layers: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="LAYER [LAYER ...]")] = (3, 6)
    """Layers whose residual stream the dictionaries read."""
    latents: Annotated[int, Range(least=1)] = 1024
    """Number of latents of a dictionary."""
    k: Annotated[int, Range(least=1)] = 16
    """Number of latents that are active in a token."""
    seeds: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="SEED [SEED ...]")] = (0, 1)
    """Seeds of the dictionaries. The comparison uses those of the first."""
    limit: Annotated[int, Range(least=8)] = 2000
    """Number of training examples of each of the two tasks."""
    eval_limit: Annotated[int, Range(least=8)] = 600
    """Number of held-out examples of each. Half of them select features, half measure them."""
    epochs: Annotated[int, Range(least=1)] = 2
    """Number of passes of a training over all tokens."""
    features: Annotated[int, Range(least=1)] = 3
    """Largest number of features of a relation that are traced and removed."""
    head_limit: Annotated[int, Range(least=1)] = 48
    """Number of questions of a relation on which heads are traced."""
    random: Annotated[int, Range(least=1)] = 20
    """Number of random dictionaries with which the found features are compared."""
    batch: Annotated[int, Range(least=1)] = 1024
    """Tokens in a step of a training."""
    activation_batch: Annotated[int, Range(least=1)] = 32
    """Questions that are run at once."""
    out: Path = Path("runs/diffing")
    """Folder for the results. A stopped study with the same options continues there."""

    def check_study(self) -> None:
        """Raises a UserError for options that do not fit together."""
        for name, given in (("layers", self.layers), ("seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                raise UserError(
                    f"--{name} is {' '.join(map(str, given)) or 'empty'}: give at least one, and none twice"
                )
        if not self.neutral_prompts:
            raise UserError("--neutral-prompts is empty: give at least one")
