"""The schemas of a comparison's result files."""

from vlm_jax.runs.artifacts import Schema

CHANGES = Schema(
    "changes",
    {
        "task": "the task, or all",
        "measure": "what was measured, such as RR, the attention to a token group or accuracy",
        "of": "of what: a cell, a layer, or a condition under which answers were given",
        "layer": "its layer; null if it has none",
        "samples": "number of samples",
        "first": "value in the first run",
        "second": "value in the second run",
        "change": "second minus first",
        "low": "lower bound of the 95 % interval of the change, over samples; null if fewer than six count",
        "high": "upper bound of this interval",
        "p": "two-sided p-value of no change; null without an interval",
        "p_holm": "the same, adjusted by Holm for all rows of the task and measure",
    },
)
RESULTS = Schema(
    "compare_results",
    {
        "command": "the command of both runs",
        "first": "folder and state of the first run",
        "second": "folder and state of the second run",
        "samples": "number of samples that both runs have",
        "left_out": "number of samples that only one of them has",
        "changes": "the rows of changes.parquet",
    },
)
