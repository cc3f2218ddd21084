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
    wrap = textwrap.TextWrapper(34)
    figure, axes = plt.subplots(len(TASKS), COLUMNS, figsize=(10, 25), layout="constrained")
    for row, task in zip(axes, TASKS, strict=True):
        for axis, example in zip(row, load_task(task, split="train", limit=COLUMNS), strict=True):
            axis.imshow(example.images[0], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            lines = [*example.question.splitlines(), f"→ {example.answers[0]}"]
            axis.set_xlabel("\n".join(map(wrap.fill, lines)), fontsize=8)
        row[0].set_ylabel(task, fontsize=10)
    figure.savefig(Path(__file__).parent / "miniworld.png", dpi=80)


if __name__ == "__main__":
    main()
