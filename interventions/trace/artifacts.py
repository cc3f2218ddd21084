"""The schemas of a trace's result files."""

from vlm_jax.runs.artifacts import Schema

SAMPLES = Schema(
    "trace_samples",
    {
        "id": "the sample",
        "task": "the task it belongs to",
        "correct": "whether greedy decoding of the clean prompt writes the gold answer",
        "p_clean": "the metric of the clean run, such as the probability of the gold answer",
        "p_corrupt": "(R,), the metric of every replicate's corrupted run",
        "ie": "(R, C), indirect effects: metric with a cell restored, less p_corrupt; cells in the order of summary rr",
    },
)
SUMMARY = Schema(
    "trace_summary",
    {
        "task": "what was traced",
        "fingerprint": "the model",
        "samples": "how many samples",
        "replicates": "corruptions of every sample",
        "te_not_positive": "samples with a total effect (TE = p_clean - p_corrupt) of at most 0",
        "excluded_by_min_te": "samples whose TE is below --min-te, which no rate counts",
        "correct": "share of samples that greedy decoding answers correctly",
        "p_clean": "mean over samples",
        "p_corrupt": "mean over samples and replicates",
        "sigma_E": "standard deviation that the noise was scaled by",
        "statistic": "the statistic of rr and ranking",
        "ranking": "cells, the most restoring first",
        "rr": "cell -> restoration rate",
        "tasks": "task -> cell -> restoration rate, of the samples of that task alone",
        "stability": "per sample size, how alike the rankings of two disjoint halves are",
        "cells": "the rows of summary.parquet",
    },
)
CELLS = Schema(
    "trace_cells",
    {
        "cell": "layer and module, head or token group, such as L3-attn",
        "statistic": "how the rate is taken over samples",
        "rr": "restoration rate",
        "rank": "1 is the highest rate",
        "low": "lower bound of the 95 % interval over samples",
        "high": "upper bound of it",
        "replicates_low": "lower bound over replicates, where there are several",
        "replicates_high": "upper bound of it",
        "both_low": "lower bound over samples and replicates, where there are several replicates",
        "both_high": "upper bound of it",
    },
)
EFFECTS = Schema(
    "trace_effects",
    {
        "task": "the task",
        "sample": "the sample's id",
        "replicate": "number of the corruption, from 0",
        "cell": "layer and module, head or token group",
        "p_clean": "the metric of the clean run",
        "p_corrupt": "the metric of the corrupted run",
        "te": "total effect: p_clean - p_corrupt",
        "ie": "indirect effect: metric with the cell restored, less p_corrupt",
        "rr": "ie / (te + eps) of this sample and replicate",
    },
)
