"""The schemas of what trainings write."""

from vlm_jax.runs.artifacts import Artifact, Schema

STEPS = Schema(
    "training_steps",
    {
        "step": "number of the step, from 1",
        "loss": "mean over the step's micro-batches",
        "grad_norm": "global norm before clipping",
        "lr": "learning rate",
        "tokens_per_second": "over the steps since the line before, without compiling",
        "step_seconds": "mean time of those steps, without compiling",
        "compile_seconds": "time spent compiling in them",
        "mfu": "share of the chips' peak FLOP/s; null where the chip is not known",
        "peak_memory_gib": "of the first device, or of the process on a CPU",
        "seconds": "since the session began",
    },
)
TABLE_1 = Schema(
    "lora_results",
    {
        "rows": "a row per condition, as in P0's table 1",
        "rows.condition": "where LoRA was placed",
        "rows.placement": "per seed, task family -> module names; null of the baseline",
        "rows.parameters": "task family -> trained parameters, mean over seeds; null of the baseline",
        "rows.FAMILY": "per seed, the held-out score",
    },
)


def training_log(of: str) -> Artifact:
    """The artifact of a training's ``metrics.jsonl``."""
    return Artifact("training", f"Training of {of}: loss and speed by step", STEPS)
