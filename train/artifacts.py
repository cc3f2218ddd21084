"""The schemas of the files that trainings write."""

from vlm_jax.runs.artifacts import Artifact, Schema

STEPS = Schema(
    "training_steps",
    {
        "step": "number of the step; the first is 1",
        "loss": "mean over the step's micro-batches",
        "grad_norm": "global norm of the gradients before clipping",
        "lr": "learning rate",
        "tokens_per_second": "speed over the steps since the previous line, without the time for compiling",
        "step_seconds": "mean time of these steps, without the time for compiling",
        "compile_seconds": "time for compiling during these steps",
        "mfu": "achieved FLOP/s as a share of the chips' peak; null if the chip's peak is not known",
        "peak_memory_gib": "largest memory use so far: of the first device, or of the process on a CPU",
        "seconds": "time since the session began",
    },
)
TABLE_1 = Schema(
    "lora_results",
    {
        "rows": "a row for each condition, as in P0's table 1",
        "rows.condition": "where LoRA was placed",
        "rows.placement": "for each seed, task family -> module names; null for the baseline",
        "rows.parameters": "task family -> number of trained parameters, mean over seeds; null for the baseline",
        "rows.FAMILY": "for each seed, the accuracy on held-out samples",
    },
)


def training_log(trained: str) -> Artifact:
    """The artifact of a training's ``metrics.jsonl``. ``trained`` says what was trained."""
    return Artifact("training", f"Training of {trained}: loss and speed by step", STEPS)
