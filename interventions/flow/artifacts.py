"""The schemas of the result files of a study of visual information flow."""

from vlm_jax.runs.artifacts import Schema

ATTENTION = Schema(
    "flow_attention",
    {
        "mass": "(B, L, H, G), the text's attention to the keys of every token group, summed over the text's tokens",
        "tokens": "(B, G), tokens of every group",
        "received": "(B, L, N), the attention to every image token, mean over heads; NaN where a sample has fewer",
    },
)
SAMPLES = Schema(
    "flow_answers",
    {
        "id": "the sample; it has one line per condition",
        "edge": "what was cut, as queries:keys; null if nothing was",
        "layers": "the layers in which it was cut; null for all",
        "mode": "how it was cut",
        "answers": "the gold answers",
        "output": "the generated text",
        "raw": "the generated text with its special tokens",
        "correct": "whether the output is a gold answer",
        "failure": "why the output is not a possible answer; null if it is one",
    },
)
WINDOWS = Schema(
    "flow_windows",
    {
        "base": "(B,), probability of the gold answer with nothing cut",
        "window": "(B, E, L), with every edge cut in the layers around every layer",
        "whole": "(B, E), with every edge cut in all layers",
    },
)
RESULTS = Schema(
    "flow_results",
    {
        "TASK.samples": "the number of samples",
        "TASK.attention": "by layer, where the text's attention goes, with 95 % intervals over samples",
        "TASK.answers": "per condition, accuracy with its interval and counts of outputs that are no possible answer",
        "TASK.windows": "p(gold), and its change for every edge: cut in each window of layers, and in all layers",
    },
)
