"""The samples in which features are most active, token by token, for the result page to lay over their pictures."""

from collections.abc import Mapping, Sequence

import numpy as np

from interventions.diff.activations import tapped
from interventions.diff.dictionaries import Stored
from interventions.diff.place import Place
from interventions.diff.selection import Feature
from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.acting import acting
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.prompts import encode
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.token_maps import TokenMap
from vlm_jax.seen import read_prompt
from vlm_jax.sites import Intervention

#: Samples in which they are looked for, and how many of a feature's best are kept.
SEARCHED, BEST = 64, 2


def feature_maps(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    features: Sequence[Feature],
    dictionaries: Mapping[Place, Stored],
    interventions: tuple[Intervention, ...] = (),
) -> tuple[list[TokenMap], list[str]]:
    """The activation of each feature in every token of the samples in which one of them is most active, and the
    features' names. Only the first :data:`SEARCHED` samples are searched.

    A map's values are ``(1, features, tokens)``.
    """
    places = list(dict.fromkeys(feature.place for feature in features))
    sites = tuple(sorted({place.site for place in places}))
    layers = tuple(sorted({place.layer or 0 for place in places}))
    found: list[TokenMap] = []
    for example in examples[:SEARCHED]:
        batch = encode([example], processor, model.config, with_answer=False)
        real = np.asarray(batch.inputs.attention_mask)[0]
        values = tapped(model, batch.inputs, sites, layers, acting(bind(interventions, batch), model.depths))
        codes = {}  # place -> (tokens, latents)
        for place in places:
            x = values[place.site][0 if place.layer is None else layers.index(place.layer), 0]
            codes[place] = fetch(dictionaries[place].dictionary.codes(x))[real]
        active = np.stack([codes[feature.place][:, feature.latent] for feature in features])
        prompt = read_prompt(batch.inputs, real, model.config, processor)
        found.append(TokenMap(example.id, example.task, prompt, active[None]))
    peaks = np.stack([one.values[0].max(1) for one in found])  # (samples, features)
    best = np.argsort(-peaks, 0)[:BEST]
    kept = [found[row] for row in sorted(set(best.ravel().tolist())) if peaks[row].max() > 0]
    return kept, [f"{feature.relation}: latent {feature.latent} of {feature.place}" for feature in features]
