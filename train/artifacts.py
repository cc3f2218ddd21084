"""The schemas of the files that trainings write."""

from vlm_jax.runs.artifacts import Artifact, Schema

STEPS = Schema(
    "training_steps",
    {
        "step": "number of the step; the first is 1",
        "loss": "training loss, mean over the micro-batches of the step",
        "grad_norm": "global norm of the gradients before clipping",
        "lr": "learning rate",
        "tokens_per_second": "mean over the steps since the previous line, with padding but without compiling time",
        "step_seconds": "mean time of one of these steps; the time for compiling is not counted",
        "compile_seconds": "time for compiling during these steps",
        "mfu": "achieved FLOP/s of the matmuls as a share of the chips' peak; null if the peak is not known",
        "peak_memory_gib": "largest memory use so far, of the first device; on a CPU, of the process",
        "step_memory_gib": "with --step-memory: memory of a step on one device, as its compiled program states it",
        "seconds": "time since this session began; a continued training has several sessions",
    },
)
DICTIONARY_STEPS = Schema(
    "dictionary_steps",
    {
        **STEPS.fields,
        "loss": "mean loss of the dictionaries that have not broken off",
        "grad_norm": "mean of their gradients' norms",
        "losses": "loss of each dictionary: FVU, plus the auxiliary and the sparsity loss",
        "alive": "whether each dictionary is still trained; false after its loss stopped being a number",
        "fvu": "fraction of variance unexplained in the step's tokens, of each dictionary",
        "l0": "mean number of active latents in a token, of each dictionary",
        "fvu_image": "as fvu, of the step's visual tokens; null without any",
        "fvu_text": "as fvu, of the step's other tokens; null without any",
        "l0_image": "as l0, of the step's visual tokens; null without any",
        "l0_text": "as l0, of the step's other tokens; null without any",
        "dead": "share of latents that were not active for --dead-after tokens, of each dictionary",
    },
)
TABLE_1 = Schema(
    "lora_results",
    {
        "rows": "a row for each choice of modules, as in P0's Table 1",
        "rows.condition": "the modules that have LoRA, such as LLM-all; Baseline is the model without LoRA",
        "rows.placement": "for each seed, an object: task family -> names of the modules; null for the baseline",
        "rows.parameters": "task family -> number of trained parameters, mean over seeds; null for the baseline",
        "rows.FAMILY": "for each seed, an object: accuracy, standard error and other results on held-out samples",
    },
)
EDITING = Schema(
    "editing_results",
    {
        "kind": "the editors' formula",
        "parameters": "editor -> number of its trained parameters",
        "trained": "task -> number of its training examples",
        "tasks.TASK.before": "mean score without the editors, and its 95 % interval over samples",
        "tasks.TASK.after": "mean score with the editors, and its 95 % interval over samples",
        "tasks.TASK.change": "after minus before on the same samples, with its 95 % interval, p, and McNemar's test",
        "tasks.TASK.samples": "number of held-out samples",
    },
)
REGISTERING = Schema(
    "registering_results",
    {
        "registers": "the registers: their number, token, mask and positions",
        "parameters": "number of trained parameters",
        "trained": "task -> number of its training examples",
        "tasks.TASK.before": "mean score of the model as it was, and its 95 % interval over samples",
        "tasks.TASK.untuned": "the same with registers and their mask, before training",
        "tasks.TASK.after": "the same after training",
        "tasks.TASK.change": "after minus before on the same samples, with its 95 % interval, p, and McNemar's test",
        "tasks.TASK.samples": "number of held-out samples",
    },
)


def training_log(trained: str, schema: Schema = STEPS) -> Artifact:
    """The artifact of a training's ``metrics.jsonl``. ``trained`` says what was trained."""
    return Artifact("training", f"Training of {trained}: loss and speed by step", schema)
