"""The schemas of the result files of model diffing (P2)."""

from vlm_jax.runs.artifacts import Schema

QUALITY = Schema(
    "dictionary_quality",
    {
        "examples": "number of held-out examples",
        "spliced": "number of them, drawn at random, on which loss and recovered were measured",
        "broke_off": "dictionaries whose loss stopped being a number, which are not written",
        "dictionaries.PLACE.fvu.GROUP": "fraction of variance unexplained, over the held-out tokens of a group",
        "dictionaries.PLACE.published_fvu.GROUP": "the same as P2's code computes it: all other tokens add to the "
        "variance",
        "dictionaries.PLACE.l0.GROUP": "number of latents that are active in a token, mean",
        "dictionaries.PLACE.dead": "share of latents that are active in no held-out token",
        "dictionaries.PLACE.loss": "mean cross-entropy of the gold answers in nats per token: clean, spliced (the "
        "activations replaced by their reconstructions) and zeroed",
        "dictionaries.PLACE.recovered": "share of the loss of zeroed activations that the reconstructions avoid",
    },
)

#: The columns that name a latent.
_LATENT = {"site": "the site", "layer": "the layer", "seed": "seed of the dictionary, or null", "latent": "its number"}
FEATURES = Schema(
    "diff_features",
    {
        **_LATENT,
        "cosine": "of its direction before and after the adaptation",
        "nearest": "the latent before with the most similar direction",
        "nearest_cosine": "the cosine with it",
        "energy": "visual energy",
        "adapted": "whether its energy is large enough and its cosine among the smallest",
        "neutral_rate": "share of the neutral questions' tokens on which it is active",
        "lexical_share": "share of pictures with neutral prompts on which it is active",
        "lexical": "whether this share is large enough",
        "RELATION.rate": "share of the relation's tokens on which it is active; spatial stands for all relations",
        "RELATION.odds_ratio": "against the neutral questions",
        "RELATION.q": "one-sided Fisher's test, adjusted by Benjamini and Hochberg",
        "RELATION.chosen": "whether it passes every filter",
    },
)
HEADS = Schema(
    "diff_heads",
    {
        **_LATENT,
        "relation": "the relation that selected it",
        "head_layer": "layer of the attention head",
        "head": "the attention head",
        "signed": "attribution patching, summed over tokens, mean over samples",
        "absolute": "the same with each token's absolute value, mean over tokens, as in P2's code",
        "exact": "the feature's activation minus that with this head's output from the run with the mean image",
    },
)
ABLATIONS = Schema(
    "diff_ablations",
    {
        **_LATENT,
        "relation": "the relation that selected it",
        "selection": "full: passes every filter; random, energy, no lexical: nulls",
        "questions": "target: the feature's relation; others: the other relations; neutral: the neutral task",
        "samples": "number of questions, all of the half that did not select",
        "before": "share of right answers",
        "after": "share of right answers without the direction",
        "difference": "after minus before",
        "low": "lower bound of its 95 % interval over samples; if no answer changed, of the share of changed answers",
        "high": "upper bound of this interval",
        "p": "two-sided",
        "p_holm": "p of the target questions, adjusted for the number of features of a selection (Holm)",
        "margin": "change of the log-odds of the right answer",
        "margin_low": "lower bound of its 95 % interval over samples",
        "margin_high": "upper bound of this interval",
    },
)
RESULTS = Schema(
    "diff_results",
    {
        "adapted.PLACE": "share of adapted latents, mean cosine, and share of latents whose nearest direction before "
        "is another latent's",
        "survivors.RELATION": "how many latents are left after each filter, over all dictionaries",
        "data_only.RELATION": "the same if the data-only control's cosines decide which latents are adapted",
        "agreement": "for each traced feature: rank correlation of attribution with exact patching, and overlap of the "
        "first five heads",
        "ablations.SELECTION.QUESTIONS": "mean over the features of a selection: change in the share of right answers, "
        "and change of the right answer's log-odds",
    },
)
