"""The schemas of a study's result files."""

from vlm_jax.runs.artifacts import Schema

MODULE_SCORES = Schema("module_scores", {"": "(L, 2), a score of every layer's attention and MLP"})
SUMMARY = Schema(
    "study_summary",
    {
        "MODEL.accuracy": "per placement and k, accuracy by family with its interval over samples and runs",
        "MODEL.comparisons": "placements against random modules: paired differences, p, and p adjusted by Holm",
        "MODEL.alone": "by family, accuracy gained by LoRA in single modules, and rank correlations with the scores",
        "MODEL.trace": "by family, the trace's samples, ranking, rr and stability",
        "MODEL.trace_difference": "per module, whether the families' rr differ (permutation test, FDR)",
        "MODEL.corruptions": "by family, how alike rr are under different corruptions",
    },
)
RUNS = Schema(
    "study_runs",
    {
        "model": "the model",
        "family": "the task family",
        "placement": "the placement rule, baseline or alone",
        "k": "modules that it chose",
        "seed": "of the training",
        "accuracy": "on held-out samples",
        "stderr": "its standard error over samples",
        "samples": "how many held-out samples",
        "parameters": "trained parameters",
        "modules": "names of the modules, separated by spaces",
    },
)
