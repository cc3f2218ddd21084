"""The schemas of scored answers."""

from vlm_jax.runs.artifacts import Schema

SAMPLES = Schema(
    "scored_samples",
    {
        "id": "the sample",
        "task": "the task it belongs to",
        "family": "the task's family, such as knowledge",
        "question": "the question",
        "answers": "the gold answers",
        "prediction": "what the model wrote",
        "correct": "whether the score is the full one",
        "metric": "the metric of the score",
        "score": "from 0 to 1",
        "read": "what the metric read out of the prediction",
    },
)
SCORE = Schema(
    "score",
    {
        "accuracy": "mean score",
        "stderr": "its standard error",
        "samples": "how many samples",
        "tasks": "task -> the same, and every value of the task's metrics",
    },
)
KEPT_SCORE = Schema(
    "kept_score",
    {
        **SCORE.fields,
        "scores": "of every sample, in the order of samples.jsonl",
        "clusters": "of every sample, a number that samples of the same image share",
    },
)
RESULTS = Schema(
    "accuracy_results",
    {
        **SCORE.fields,
        "task": "what was asked for",
        "metric": "the metric, or that each task has its own",
        "metric_options": "normalisation, several gold answers, choices",
        "compiled_shapes": "how many shapes of batches were compiled",
        "interventions": "a hash of the interventions that acted",
        **dict.fromkeys(
            ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "task_hashes"),
            "as in lmms-eval's results",
        ),
    },
)
LMMS_EVAL_SAMPLES = Schema(
    "lmms_eval_samples",
    {
        "doc_id": "number of the sample within its task",
        "id": "the sample",
        "target": "the first gold answer",
        "input": "the prompt",
        "resps": "what the model wrote",
        "filtered_resps": "what the metric read out of it",
        "doc_hash": "a hash of the sample, its images included",
        "METRIC": "the score, and the metric's other values as METRIC_NAME",
    },
)
