"""The options of `python -m interventions.talo`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interventions.options import StateOptions
from interventions.talo.selection import SelectOptions, Similarity
from interventions.talo.tables import Cut
from vlm_jax.data.miniworld import TASKS
from vlm_jax.data.options import DataOptions
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, Range


@dataclasses.dataclass(frozen=True)
class Args(SelectOptions, StateOptions, DataOptions, ModelOptions):
    """Find the layers that hurt each task, choose one to cut on a few samples, and measure the choice on others (P3).

    A sample counts as right if greedy decoding would write exactly the first gold answer and then stop; without
    the chat template, whatever it writes then.
    """

    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = tuple(
        name for name, task in TASKS.items() if task.family
    )
    """Tasks: names, families (knowledge, perception, p0-knowledge ...), JSONL files or folders."""
    cut: Cut = "attn"
    """What a cut removes from a layer. attn: the attention's output (the paper's choice); uniform: queries are zeroed,
    so that all tokens get equal attention; mlp: the MLP's output; block: attention and MLP."""
    split: str = "eval"
    """Which split of a named task to use: trace, train, eval or test."""
    limit: Annotated[int | None, Range(least=1)] = 240
    """How many samples of each task to use. Up to a third are used to choose a layer, the others to evaluate it."""
    by: Literal["task", "subtask"] = "task"
    """Compare the interaction vectors of tasks, or of their subtasks (the categories of a dataset)."""
    similarity: Similarity = "pearson"
    """How two interaction vectors are compared: Pearson's correlation or the cosine of their angle."""
    batch: Annotated[int, BATCH] = 32
    """Samples that are run at once. Larger batches are faster and need more memory."""
    draws: Annotated[int, Range(least=1)] = 1000
    """How many probe sets, bootstrap resamples and permutations are drawn."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the choice and of all draws."""
    out: Path = Path("runs/talo")
    """Run folder: results.json, samples.jsonl, vectors.npz, figures, and per task its table.npz and cut.safetensors."""
