"""The options of `python -m interventions.diff`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from interventions.diff.features import Energy
from interventions.diff.heads import Direction
from interventions.kinds.groups import members
from interventions.options import StateOptions
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, Range


@dataclasses.dataclass(frozen=True)
class FilterOptions:
    """Which latents become features."""

    energy: Energy = "raw"
    """Visual energy of a latent. raw: its mean squared code on prompts with pictures (P2's code); ratio: divided by
    that of the text model on the same questions without pictures; share: divided by the sum of both. The last two are
    measured on the tokens of the questions, because the two models read different template words."""
    least_energy: Annotated[float, Range(least=0)] = 0.01
    """Smallest visual energy of an adapted latent."""
    percentile: Annotated[float, Range(above=0, below=100)] = 25.0
    """Adapted latents are among this percentage with the smallest cosine between their directions before and after."""
    pooled: bool = False
    """Take the percentage over all layers together, as in P2's command, instead of in each layer."""
    least_ratio: Annotated[float, Range(above=0)] = 3.0
    """Smallest odds ratio of being active on tokens of a relation's questions against those of neutral questions."""
    least_difference: Annotated[float, Range(least=0)] = 0.005
    """Smallest difference of these two shares of tokens."""
    level: Annotated[float, Range(above=0, below=1)] = 0.05
    """Largest p-value (one-sided Fisher's test), adjusted for the number of latents by Benjamini and Hochberg."""
    neutral_prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT [PROMPT ...]")] = (
        "Describe the picture.",
        "What does the picture show?",
        "Describe everything in one sentence.",
    )
    """Prompts without spatial words that replace the questions: a feature that is active only on the words of a
    question is left out (lexical filter)."""
    least_share: Annotated[float, Range(least=0, below=1)] = 0.01
    """Smallest share of pictures with neutral prompts on which a feature is active."""


@dataclasses.dataclass(frozen=True)
class CompareOptions(FilterOptions):
    """How dictionaries are compared, and how their features are traced and removed."""

    tokens: str = "text"
    """Token group in which latents are counted. text: the text behind the picture (P2)."""
    features: Annotated[int, Range(least=1)] = 3
    """Largest number of features of a relation that are traced and removed."""
    head_limit: Annotated[int, Range(least=1)] = 48
    """Number of questions of a relation on which heads are traced."""
    at: Direction = "A"
    """Where attribution patching takes gradients. A: in the run with the picture; B: in the run with the mean image."""
    steps: Annotated[int, Range(least=1)] = 1
    """Number of runs between those two over which gradients are averaged (integrated gradients)."""
    steer: Annotated[float | None, Range()] = None
    """Add this many unit lengths of a feature's direction where the feature is (steering), instead of removing the
    direction everywhere. The dictionary's own codes tell which sizes are usual."""
    activation_batch: Annotated[int, BATCH] = 32
    """Questions that are run at once."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the random features and of the intervals."""


@dataclasses.dataclass(frozen=True)
class Args(CompareOptions, StateOptions, DataOptions, ModelOptions):
    """Find features that learnt to see, which of them belong to spatial relations, which heads drive them and what
    their removal costs (P2), by comparing dictionaries that train.sae wrote.

    Half of the questions of every relation select features, the other half measures them.
    """

    base: Path | None = None
    """Run folder of the train.sae on the text model."""
    adapted: Path | None = None
    """Run folder of the train.sae that adapted these dictionaries to --model (with --init)."""
    data_only: Path | None = None
    """Run folder of the train.sae that adapted them to the text model's own activations on the same questions: a
    control that shows what the data alone change."""
    text_model: str | None = None
    """The text model, for --energy ratio and share."""
    task: str = "mini-vsr"
    """Task of the relations: questions with yes or no, whose subtasks are the relations."""
    neutral: str = "mini-vqa"
    """Task of the neutral questions, also with yes or no."""
    split: str = "test"
    """Which split of both tasks to use: trace, train, eval or test."""
    limit: Annotated[int, Range(least=4)] = 600
    """Largest number of questions of each of the two tasks."""
    out: Path = Path("runs/diff")
    """Run folder: features.parquet, heads.parquet, ablations.parquet, results.json and figures."""

    def folders(self) -> dict[str, Path]:
        """The run folders with dictionaries that are given.

        Raises:
            UserError: if one that is needed is missing, or for options that do not fit together.
        """
        for name in ("base", "adapted"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing: name the --out of a train.sae")
        if self.energy != "raw" and self.text_model is None:
            raise UserError(f"--energy {self.energy} compares with the text model: give --text-model")
        if not self.neutral_prompts:
            raise UserError("--neutral-prompts is empty: give at least one")
        members(self.tokens)  # refuses unknown groups, and parts of groups
        return {
            name: folder for name in ("base", "adapted", "data_only") if (folder := getattr(self, name)) is not None
        }
