"""Draws docs/miniworld.png: a few examples of every miniworld task.   python docs/figures.py"""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vlm_jax.data import load_task
from vlm_jax.data.miniworld import TASKS

COLUMNS = 4


def main() -> None:
    figure, axes = plt.subplots(len(TASKS), COLUMNS, figsize=(10, 17), layout="constrained")
    for row, task in zip(axes, TASKS, strict=True):
        for axis, example in zip(row, load_task(task, split="train", limit=COLUMNS), strict=True):
            axis.imshow(example.images[0], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            question = "\n".join(textwrap.fill(line, 34) for line in example.question.splitlines())
            axis.set_xlabel(f"{question}\n→ {example.answers[0]}", fontsize=8)
        row[0].set_ylabel(task, fontsize=10)
    figure.savefig(Path(__file__).parent / "miniworld.png", dpi=80)


if __name__ == "__main__":
    main()
