"""The schemas of scored answers."""

from vlm_jax.runs.artifacts import Schema

SAMPLES = Schema(
    "scored_samples",
    {
        "id": "the sample",
        "task": "the sample's task",
        "family": "the task's family, such as knowledge",
        "question": "the question",
        "answers": "the gold answers",
        "prediction": "what the model wrote",
        "correct": "whether the score is 1",
        "metric": "the metric of the score",
        "score": "from 0 to 1",
        "read": "the answer that the metric recognised in the prediction",
        "cluster": "number of the sample's cluster: samples that show the same image share it",
    },
)
_ACCURACY = {
    "accuracy": "mean score",
    "stderr": "its standard error",
    "low": "lower bound of its 95 % interval",
    "high": "upper bound of this interval",
    "samples": "number of samples",
    "tasks": "task -> its accuracy, stderr, low, high and samples, and all values that its metrics report",
}
SCORE = Schema(
    "score",
    {
        **_ACCURACY,
        "scores": "score of every sample, in the order of samples.jsonl",
        "clusters": "number of every sample's cluster: samples that show the same image share it",
    },
)
RESULTS = Schema(
    "accuracy_results",
    {
        **_ACCURACY,
        "task": "value of --task",
        "metric": "the metric; task if each task has another",
        "metric_options": "normalisation, several gold answers, choices",
        "compiled_shapes": "number of batch shapes for which generation was compiled",
        "interventions": "hash of the interventions that acted on the model",
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
        "filtered_resps": "the answer that the metric recognised in it",
        "doc_hash": "a hash of the sample, its images included",
        "METRIC": "the score, and the metric's other values as METRIC_NAME",
    },
)
