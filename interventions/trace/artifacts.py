"""The schemas of a trace's result files."""

from vlm_jax.runs.artifacts import Schema

SAMPLES = Schema(
    "traced_samples",
    {
        "id": "the sample",
        "task": "the task it belongs to",
        "question": "the question",
        "answer": "the gold answer that is scored",
        "prediction": "what greedy decoding of the clean prompt writes; null if an intervention acts on tokens that a "
        "prompt without its answer lacks",
        "correct": "whether greedy decoding of the clean prompt writes the gold answer",
        "p_clean": "the metric of the clean run, such as the probability of the gold answer",
        "p_corrupt": "(R,), the metric of every replicate's corrupted run",
        "te": "(R,), total effect of every replicate: p_clean - p_corrupt",
        "ie": "cell -> (R,), indirect effect: the metric with this cell restored, minus p_corrupt (with --direction "
        "break: p_clean minus the metric with it broken); null where the sample has no token of the cell's group",
    },
)
SUMMARY = Schema(
    "trace_summary",
    {
        "task": "what was traced",
        "fingerprint": "the model",
        "patch": "what cells' values became, as --patch",
        "direction": "restore, or break: RR is then the share of TE that breaking a cell loses",
        "samples": "the number of samples",
        "replicates": "corruptions of every sample",
        "te_not_positive": "samples with a total effect (TE = p_clean - p_corrupt) of at most 0",
        "excluded_by_min_te": "samples whose TE is below --min-te: mean_of_ratios and median leave them out",
        "correct": "share of samples that greedy decoding answers correctly",
        "p_clean": "mean over samples",
        "p_corrupt": "mean over samples and replicates",
        "sigma_E": "standard deviation that the noise was scaled by",
        "statistic": "the statistic of rr and ranking",
        "ranking": "cells, the most restoring first; those without a rate are left out",
        "rr": "cell -> restoration rate; null if no counted sample has a token of the cell's group",
        "missing": "cell -> samples without a token of its group, which do not count in its rate; cells without any "
        "are left out",
        "tasks": "task -> cell -> restoration rate, from the samples of that task only",
        "task_samples": "task -> how many of its samples count in these rates",
        "stability": "per sample size, how similar the rankings of two disjoint sets of samples are",
        "cells": "the rows of summary.parquet",
    },
)
CELLS = Schema(
    "trace_cells",
    {
        "cell": "layer and module, head or token group, such as L3-attn",
        "statistic": "how the rate sums up the samples",
        "rr": "restoration rate; null if no counted sample has a token of the cell's group",
        "rank": "1 is the highest rate; null without a rate",
        "samples": "how many samples count: those with TE of at least --min-te, or all for the ratio of means",
        "low": "lower bound of the 95 % interval over samples; null if fewer than six count",
        "high": "upper bound of this interval",
        "replicates_low": "lower bound of the interval over replicates, if there are several",
        "replicates_high": "upper bound of this interval",
        "both_low": "lower bound of the interval over samples and replicates, if there are several replicates",
        "both_high": "upper bound of this interval",
    },
)
EFFECTS = Schema(
    "trace_replicates",
    {
        "task": "the task",
        "id": "the sample",
        "replicate": "number of the corruption, from 0",
        "cell": "layer and module, head or token group",
        "p_clean": "the metric of the clean run",
        "p_corrupt": "the metric of the corrupted run",
        "te": "total effect: p_clean - p_corrupt",
        "ie": "indirect effect: metric with the cell restored, minus p_corrupt; NaN if the sample has no token of the "
        "cell's group",
        "rr": "ie / (te + eps) of this sample and replicate",
    },
)
