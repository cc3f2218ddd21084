"""The schemas of the result files of a study of visual information flow.

Axes of the arrays: B samples, L layers, H heads, G token groups (:data:`interventions.kinds.groups.GROUPS`), N image
tokens, E edges. An edge is the attention from some token groups (queries) to others (keys), such as text:image. If an
edge is cut, this attention is removed.
"""

from vlm_jax.runs.artifacts import Schema

ATTENTION = Schema(
    "flow_attention",
    {
        "mass": "(B, L, H, G), the attention of the text to each token group, summed over the text's tokens",
        "tokens": "(B, G), the number of tokens of each group",
        "received": "(B, L, N), the attention of the text to each image token, summed over the text's tokens, mean "
        "over heads; NaN where a sample has fewer image tokens than N",
    },
)
SAMPLES = Schema(
    "flow_answers",
    {
        "id": "the sample's id; a sample has one line for each condition, which is edge, layers and mode",
        "edge": "the attention that was cut, as queries:keys; null if nothing was cut",
        "layers": "the layers in which the edge was cut; null if it was cut in all layers, or if nothing was cut",
        "mode": "how the edge was cut, as in --modes; null if nothing was cut",
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
        "base": "(B,), probability of the gold answer if nothing is cut",
        "window": "(B, E, L), the probability if one edge is cut in the window of layers around one layer",
        "whole": "(B, E), the probability if one edge is cut in all layers",
    },
)
RESULTS = Schema(
    "flow_results",
    {
        "TASK.samples": "the number of samples",
        "TASK.attention": "by layer, the shares of the text's attention that go to each token group, and how many "
        "image tokens hold most of the image's share, with 95 % intervals over samples",
        "TASK.answers": "for each condition, the accuracy with its interval, and counts of outputs that are no "
        "possible answer",
        "TASK.windows": "probability of the gold answer, and for each edge its change if the edge is cut in one window "
        "of layers or in all layers",
    },
)
