"""The schemas of the result files of a study of visual information flow."""

from vlm_jax.runs.artifacts import Schema

ATTENTION = Schema(
    "flow_attention",
    {
        "mass": "(B, L, H, G), the text's attention to the keys of every token group, summed over the text's tokens",
        "tokens": "(B, G), tokens of every group",
        "received": "(B, L, N), what every image token receives, mean over heads; NaN beyond a sample's image tokens",
    },
)
SAMPLES = Schema(
    "flow_answers",
    {
        "id": "the sample; it has one line per condition",
        "edge": "what was cut, as queries:keys; null where nothing was",
        "layers": "the layers in which it was cut; null for all",
        "mode": "how it was cut",
        "answers": "the gold answers",
        "output": "the answer as it reads",
        "raw": "the answer with its special tokens",
        "correct": "whether the output is a gold answer",
        "failure": "why the output is no possible answer; null where it is one",
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
        "TASK.samples": "how many samples",
        "TASK.attention": "by layer, where the text's attention goes, with 95 % intervals over samples",
        "TASK.answers": "per condition, accuracy with its interval and counts of outputs that are no possible answer",
        "TASK.windows": "p(gold), and its change by edge, in every window and with all layers cut",
    },
)
