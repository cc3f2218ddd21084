"""The schemas of TaLo's result files."""

from vlm_jax.runs.artifacts import Schema

TABLE = Schema(
    "talo_table",
    {
        "base": "(N,), whether the unchanged model is right, for every sample",
        "correct": "(L, N), whether it is right with each layer cut",
    },
)
SAMPLES = Schema(
    "talo_samples",
    {
        "task": "the task",
        "id": "the sample",
        "subtask": "the task, and the category within it if there is one",
        "question": "the question",
        "answer": "the gold answer",
        "used": "probe (the set that decided), pool (drawn for choosing, but not in that set) or eval",
        "base": "whether the unchanged model is right",
        "cut": "(L,), whether it is right with each layer cut",
    },
)
VECTORS = Schema(
    "talo_vectors",
    {
        "names": "(T,), tasks or sub-tasks",
        "delta": "(T, L), interaction vectors: change in accuracy when a layer is cut",
        "low": "(T, L), lower bound of the 95 % interval over samples",
        "high": "(T, L), upper bound of this interval",
        "similarity": "(T, T), similarity of the vectors",
        "together": "(T, T), the share of resamples in which two tasks are in the same half of the tree",
    },
)
RESULTS = Schema(
    "talo_results",
    {
        "metric": "how a sample is judged",
        "tasks.TASK": "the chosen layer, its gain on the probe and the eval set, and controls",
        "halves": "the two halves of the tree: names, and the share of resamples with their least stable pair together",
    },
)
