"""The schemas of the files that a study writes."""

from vlm_jax.runs.artifacts import Schema

MODULE_SCORES = Schema("module_scores", {"": "(L, 2): the score of every layer's attention and MLP"})
SUMMARY = Schema(
    "study_summary",
    {
        "MODEL.accuracy": "for each placement and k: accuracy by family, with its interval over samples and runs",
        "MODEL.comparisons": "placements against random modules: paired differences, p, and p adjusted by Holm",
        "MODEL.alone": "by family: accuracy gained by LoRA on single modules, and rank correlations with the scores",
        "MODEL.trace": "by family: the trace's samples, ranking, rr and stability",
        "MODEL.trace_difference": "for each module: whether the families' rr differ (permutation test, FDR)",
        "MODEL.corruptions": "by family: correlations between rr under different corruptions",
    },
)
RUNS = Schema(
    "study_runs",
    {
        "model": "the model",
        "family": "the task family",
        "placement": "the placement rule, baseline or alone",
        "k": "number of modules to choose",
        "seed": "seed of the training",
        "accuracy": "accuracy on held-out samples",
        "stderr": "its standard error over samples",
        "samples": "number of held-out samples",
        "parameters": "number of trained parameters",
        "modules": "names of the modules, separated by spaces",
    },
)
EDITING_SUMMARY = Schema(
    "editing_summary",
    {
        "rows.condition": "what was trained",
        "rows.section": "what the condition is about",
        "rows.parameters": "number of trained parameters",
        "rows.seeds": "number of trainings",
        "rows.step_seconds": "median time of a training step, without compiling; null without a training",
        "rows.step_memory_gib": "memory of a training step on one device, as its compiled program states it; or null",
        "rows.accuracy.PART": "mean score on a part of the held-out examples, with its 95 % interval",
        "rows.minus_full": "less the full method on the trained tasks: difference, interval, p, p adjusted by Holm",
        "reported": "the paper's numbers",
    },
)
REGISTERING_ANSWERS = Schema(
    "registering_answers",
    {
        "id": "the sample's id",
        "task": "its task",
        "answers": "the gold answers",
        "output": "the generated text",
        "raw": "the generated text with its special tokens",
        "correct": "whether the output is a gold answer",
        "failure": "why the output is not a possible answer; null if it is one",
        "cut": "output, correct and failure if text cannot read the registers; only with registers",
    },
)
REGISTERING_SUMMARY = Schema(
    "registering_summary",
    {
        "rows.condition": "what text may read of a picture, and the training data",
        "rows.section": "what the condition is about",
        "rows.seeds": "number of trainings",
        "rows.accuracy.PART": "mean score on all held-out examples, a family's or a task's, with its 95 % interval",
        "rows.failed": "share of outputs that are no possible answer, with its 95 % interval",
        "rows.cut": "accuracy if text cannot read the registers either, with its 95 % interval; null without registers",
        "rows.compared_with": "the condition that shows what this one loses",
        "rows.difference": "less that condition: difference, interval, p, p adjusted by Holm",
        "reported": "the paper's numbers",
    },
)
CONTROL_ANSWERS = Schema(
    "control_answers",
    {
        "kind": "fixed, rewording N, another class, or own question",
        "id": "the picture and what was asked",
        "picture": "the picture",
        "question": "the question",
        "true": "the true answer",
        "answer": "what the model wrote, in lower case",
    },
)
CONTROL_SUMMARY = Schema(
    "control_summary",
    {
        "rows.task": "the pictures",
        "rows.condition": "which tokens were edited, or unedited",
        "rows.right": "of the unedited model: share of true answers, with its 95 % interval over pictures",
        "rows.MEASURE": "share of answers that were turned or stayed, with its 95 % interval over pictures",
    },
)
RECALL = Schema(
    "recall",
    {
        "": "a list with an object for each relation and layer",
        "layer": "the layer",
        "relation": "the relation",
        "samples": "number of questions, of the half that selected no features",
        "ceiling": "AUROC of logistic regression on the mean activation of the text: does the relation hold?",
        "features": "AUROC of the best feature that passed every filter; null if there is none",
        "best": "AUROC of the dictionary's best latent",
        "random": "AUROC of the best latent of each random dictionary",
        "as_good": "share of random dictionaries that do as well as the trained one",
    },
)
CROSSCODERS = Schema(
    "crosscoders",
    {
        "": "a list with an object for each layer",
        "layer": "the layer",
        "fvu": "fraction of variance unexplained of held-out questions, in each model",
        "latents": "number of latents that belong to the text model, to both, and to the vision-language model",
        "auroc": "for each relation, on questions that selected nothing",
        "auroc.RELATION.best": "AUROC of the best latent; null if none is ever active",
        "auroc.RELATION.own": "AUROC of the best latent of the vision-language model; null if there is none",
    },
)
DIFFING_SUMMARY = Schema(
    "diffing_summary",
    {
        "dictionaries": "for each condition, means over its dictionaries: FVU by token group, the published FVU, dead "
        "latents, loss recovered, cosine with the text model's dictionaries",
        "between_seeds": "layer -> mean cosine between the most similar latents of two seeds",
        "compared": "the results of the comparison, as in diff/results.json; and survivors also of the second seed's "
        "dictionaries (second_seed) and of those that were not adapted (from_scratch)",
        "recall": "as in auroc.json",
        "crosscoders": "as in crosscoder.json",
        "reported": "the paper's numbers",
    },
)
