"""The schemas of TaLo's result files."""

from vlm_jax.runs.artifacts import Schema

TABLE = Schema(
    "talo_table",
    {
        "base": "(N,), whether every sample is right as the model is",
        "correct": "(L, N), whether it is right with a layer cut",
    },
)
SAMPLES = Schema(
    "talo_samples",
    {
        "task": "the task",
        "id": "the sample",
        "subtask": "task, and the category within it where there is one",
        "question": "the question",
        "answer": "the gold answer",
        "used": "what for: probe, pool (drawn but not in the best probe set) or eval",
        "base": "whether it is right as the model is",
        "cut": "(L,), whether it is right with each layer cut",
    },
)
VECTORS = Schema(
    "talo_vectors",
    {
        "names": "(T,), tasks or sub-tasks",
        "delta": "(T, L), interaction vectors: change in accuracy when a layer is cut",
        "low": "(T, L), lower bound of the 95 % interval over samples",
        "high": "(T, L), upper bound of it",
        "similarity": "(T, T), of the vectors",
        "together": "(T, T), in what share of resamples two tasks are in the same half of the tree",
    },
)
RESULTS = Schema(
    "talo_results",
    {
        "metric": "how a sample is judged",
        "tasks.TASK": "the chosen layer, its gain on the probe and the eval set, and controls",
        "halves": "the two halves of the tree: names, and how often their least alike pair is together",
    },
)
