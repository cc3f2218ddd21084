"""Tables in the papers' shape."""

import numpy as np


def table1(rows: list[dict], families: list[str]) -> str:
    """P0's Table 1 as Markdown: accuracy per family, and trainable parameters.

    Args:
        rows: ``condition``, ``parameters`` (family -> count, or None) and per family a list of scores, one per seed.
    """
    lines = [
        "| LoRA target | " + " | ".join(families) + " | trainable parameters |",
        "|---" * (len(families) + 2) + "|",
    ]
    for row in rows:
        cells = [_accuracy(row[family]) for family in families]
        lines.append(f"| {row['condition']} | " + " | ".join(cells) + f" | {_parameters(row['parameters'])} |")
    return "\n".join(lines) + "\n"


def _accuracy(scores: list[dict]) -> str:
    mean = np.mean([score["accuracy"] for score in scores])
    # Seeds share their samples, so averaging over them does not shrink the sampling error.
    error = np.mean([score["stderr"] for score in scores])
    return f"{mean:.3f} ± {error:.3f}"


def _parameters(counts: dict[str, float] | None) -> str:
    if counts is None:
        return "-"
    return " / ".join(dict.fromkeys(f"{count:,.0f}" for count in counts.values()))
