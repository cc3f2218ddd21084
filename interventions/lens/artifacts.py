"""The schemas of the result files of the lens.

Axes of the arrays: B samples; P points of the residual stream, which are the embeddings and then what each layer
leaves, so P = L + 1; L layers; H heads; K words.
"""

from vlm_jax.runs.artifacts import Schema

LENS = Schema(
    "lens_arrays",
    {
        "gold": "(B,), id of the first token of the gold answer, the gold word",
        "foil": "(B,), id of the word whose logit is subtracted; -1 if none is",
        "words": "(B, P, K), ids of the likeliest words at the last token of the prompt, the likeliest first",
        "probability": "(B, P, K), their probabilities",
        "p_gold": "(B, P), the probability of the gold word",
        "rank": "(B, P), the rank of the gold word among all words; 1 is the likeliest",
        "logit": "(B,), the logit of the gold word, minus that of the foil if there is one, before any softcap; it is "
        "the sum of embeddings, attn, mlp, deepstack and edits",
        "embeddings": "(B,), what the token's embedding contributes to the logit",
        "attn": "(B, L), what each layer's attention contributes",
        "heads": "(B, L, H), what each head contributes to attn",
        "attn_rest": "(B, L), attn without its heads: biases, and what interventions add behind the heads",
        "mlp": "(B, L), what each layer's MLP contributes",
        "deepstack": "(B, L), what the visual features that DeepStack adds contribute; 0 at tokens of text",
        "edits": "(B, L), what interventions change in the residual stream itself",
    },
)
SAMPLES = Schema(
    "lens_samples",
    {
        "id": "the sample's id",
        "answers": "the gold answers",
        "gold": "the gold word: the first token of the first gold answer",
        "foil": "the word whose logit is subtracted; null if none is",
        "said": "the likeliest word at the end",
        "correct": "whether that is the gold word",
        "settled": "the number of layers after which the gold word is the likeliest for good, 0 if the embeddings have "
        "it; null if it is not at the end",
        "logit": "the logit of the gold word, minus that of the foil if there is one",
        "embeddings": "what the token's embedding contributes to it",
        "attn": "(L,), what each layer's attention contributes",
        "mlp": "(L,), what each layer's MLP contributes",
        "p_gold": "(P,), the probability of the gold word; first of the embeddings, then after each layer",
        "rank": "(P,), its rank",
        "words": "(P, K), the likeliest words",
        "probability": "(P, K), their probabilities",
    },
)
RESULTS = Schema(
    "lens_results",
    {
        "TASK.samples": "the number of samples",
        "TASK.lens": "by point of the residual stream (the embeddings, then each layer): the probability of the gold "
        "word and the share of samples in which it is the likeliest, with 95 % intervals, and its median rank",
        "TASK.attribution": "what each part contributes to the logit, as means over samples with 95 % intervals: a "
        "number, or one for each layer, or for each layer and head; parts that are 0 in all samples are left out",
    },
)
