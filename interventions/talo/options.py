"""The options of `python -m interventions.talo`."""

import dataclasses
from pathlib import Path
from typing import Literal

from interventions.talo.selection import SelectOptions, Similarity
from interventions.talo.tables import Cut
from vlm_jax.data.miniworld import TASKS
from vlm_jax.data.options import DataOptions
from vlm_jax.runs.options import ModelOptions


@dataclasses.dataclass(frozen=True)
class Args(SelectOptions, DataOptions, ModelOptions):
    """Find, for every task, which layers hurt it, choose one to cut on a few samples, and measure that on others (P3).

    Accuracy is forced-greedy: greedy decoding would write the first gold answer to the letter and stop.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    """Task names, families (knowledge, perception, p0-knowledge ...), JSONL files or folders."""
    cut: Cut = "attn"
    """What is taken out of a layer: its attention's output (attn, the paper's), the even attention of zeroed queries
    (uniform), its MLP's output (mlp), or attention and MLP (block)."""
    split: str = "eval"
    """Split of named tasks: trace, train, eval or test."""
    limit: int | None = 240
    """Samples of every task: the pool takes up to a third of them, the others evaluate the choice."""
    by: Literal["task", "subtask"] = "task"
    """Whose interaction vectors are compared. Sub-tasks are a dataset's categories."""
    similarity: Similarity = "pearson"
    """What is compared of two interaction vectors."""
    batch: int = 32
    """Samples per compiled call."""
    draws: int = 1000
    """Probe sets, bootstrap resamples and permutations."""
    seed: int = 0
    """Seed of the choice and of all draws."""
    out: Path = Path("runs/talo")
    """Run folder: results.json, samples.jsonl, vectors.npz, figures, and per task its table.npz and cut.safetensors."""
