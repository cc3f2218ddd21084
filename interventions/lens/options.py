"""The options of ``python -m interventions.lens``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interventions.options import StateOptions
from vlm_jax.data.options import DataOptions
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, Range


@dataclasses.dataclass(frozen=True)
class Args(StateOptions, DataOptions, ModelOptions):
    """Read the residual stream at the token that writes the answer: which words it stands for after every layer (the
    logit lens), and what every layer, module and head writes towards the answer (direct logit attribution). For some
    samples also which words the picture's tokens stand for."""

    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ("mini-okvqa", "mini-docvqa")
    """Tasks: names, families (knowledge, perception, p0-knowledge ...), JSONL files or folders."""
    limit: Annotated[int, Range(least=1)] = 48
    """How many samples of each task to use."""
    split: Literal["trace", "train", "eval", "test"] = "trace"
    """Which of a task's samples: those for analyses, for training, or for scores. JSONL files have one split only."""
    top: Annotated[int, Range(least=1)] = 5
    """How many of the likeliest words to keep, for each sample and layer."""
    against: Literal["likeliest", "nothing"] = "likeliest"
    """What is attributed. likeliest: the logit of the answer's first token minus that of the likeliest other token at
    the end; nothing: its logit alone, of which a part may raise the logits of all tokens alike."""
    batch: Annotated[int, BATCH] = 16
    """Samples that are run at once. Larger batches are faster and need more memory."""
    maps: Annotated[int, Range(least=0)] = 2
    """Of how many samples of each task to keep which word every token stands for, for the result page (eval.page)."""
    layers: Annotated[tuple[int, ...] | None, Range(least=0)] = None
    """After which layers a figure shows the words of the first of these pictures; by default after four, the last one
    among them. The page shows all."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the bootstrap intervals."""
    out: Path = Path("runs/lens")
    """Run folder: results.json, three figures, and per task samples.jsonl, lens.npz and token_maps/."""
