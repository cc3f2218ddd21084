"""From dictionaries to features: what every latent did, which filters it passes, and which latents are chosen."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from interventions.dictionary import Dictionary
from interventions.diff.activations import Computed
from interventions.diff.features import Rotation, adapted_latents, cosine_limits, visual_energy
from interventions.diff.options import FilterOptions
from interventions.diff.place import Place
from interventions.diff.quality import Sums
from interventions.diff.spatial import Enrichment, enrichment
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.runs.processes import progress

#: The name of all relations together.
SPATIAL = "spatial"
#: Tokens that a model with a picture and one without read alike. What else counts as text differs: without a picture it
#: begins at the question.
SAME = "question"


def clusters(examples: Sequence[Example]) -> list[int]:
    """The cluster of each example. Questions about one picture are one cluster, and so are neighbours with the same
    question, such as the miniworld's twins."""
    numbers: dict[tuple, int] = {}
    found, previous, run = [], None, 0
    for example in examples:
        run += example.question != previous
        previous = example.question
        key = ("image", example.image_id) if example.image_id is not None else ("run", run)
        found.append(numbers.setdefault(key, len(numbers)))
    return found


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The half that selects and the half that measures, each with about half of the questions of every subtask. A
    cluster is never divided."""
    grouped: dict[int, list[Example]] = {}
    for cluster, example in zip(clusters(examples), examples, strict=True):
        grouped.setdefault(cluster, []).append(example)
    parts: tuple[list[Example], list[Example]] = ([], [])
    counts: tuple[Counter, Counter] = (Counter(), Counter())
    for cluster in grouped.values():
        # To the half that has fewer questions of these subtasks, or fewer at all.
        costs = [(sum(count[e.subtask] for e in cluster), count.total()) for count in counts]
        half = int(costs[1] < costs[0])
        parts[half].extend(cluster)
        counts[half].update(example.subtask for example in cluster)
    return parts


def large_enough(examples: Sequence[Example]) -> list[Example]:
    """The questions of relations that have some in both halves; prints which relations are left out.

    Raises:
        UserError: if no relation is left, or an example has no subtask, which is the relation.
    """
    while True:
        parts = [set(by_relation(half)) for half in halves(examples)]
        if not (lacking := sorted(parts[0] ^ parts[1])):
            break
        print(f"note: too few questions, left out: {', '.join(lacking)}")
        examples = [example for example in examples if example.subtask not in lacking]
    if not parts[0]:
        raise UserError("no relation has questions in both halves: give a larger --limit, or another --task")
    return list(examples)


def by_relation(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Relation -> its examples.

    Raises:
        UserError: if an example has no subtask, which is the relation.
    """
    relations: dict[str, list[Example]] = {}
    for example in examples:
        if example.subtask is None:
            raise UserError(
                f"example {example.id!r} has no subtask, which would be its relation: choose another --task"
            )
        relations.setdefault(example.subtask, []).append(example)
    return dict(sorted(relations.items()))


def with_prompts(examples: Sequence[Example], prompts: Sequence[str]) -> list[Example]:
    """The pictures of the examples with each of some prompts in place of the questions."""
    return [
        dataclasses.replace(example, id=f"{example.id}/neutral-{number}", question=prompt, choices=None)
        for example in examples
        for number, prompt in enumerate(prompts)
    ]


def active_share(
    source: Computed, dictionaries: Mapping[Place, Dictionary], tokens: str
) -> dict[Place, Float[np.ndarray, " latents"]]:
    """The share of examples in which each latent is active on at least one token of a group."""
    counts = {place: np.zeros(dictionary.latents) for place, dictionary in dictionaries.items()}
    wanted = source.index.among(tokens)
    for block in progress(range(len(source.blocks)), desc="neutral prompts", unit="block", leave=False):
        rows = source.index.block == block
        values, kept, example = source.read(block), wanted[rows], source.index.example[rows]
        for place, dictionary in dictionaries.items():
            x = values[place.site][source.number(place.layer)]
            active = np.asarray(dictionary.codes(x)) > 0
            for number in np.unique(example):
                counts[place] += active[(example == number) & kept].any(0)
    return {place: count / len(source.examples) for place, count in counts.items()}


class Measured(NamedTuple):
    """What was measured of one dictionary, on the half that selects. Sums are over one token group."""

    rotation: Rotation
    """Against the dictionary that it was adapted from."""
    relations: dict[str, Sums]
    """Relation -> sums over the tokens of its questions."""
    neutral: Sums
    """Sums over the tokens of neutral questions."""
    text: tuple[Sums, Sums] | None
    """Sums over the tokens of the questions alone (:data:`SAME`): of this model, and of the text model without
    pictures; None if these were not measured."""
    lexical: Float[np.ndarray, " latents"]
    """Share of pictures with neutral prompts on which a latent is active."""

    def all_questions(self) -> Sums:
        """The sums over all questions, spatial and neutral."""
        return total([*self.relations.values(), self.neutral])

    def energy(self, options: FilterOptions) -> Float[np.ndarray, " latents"]:
        """The visual energy of each latent."""
        every, text = self.all_questions(), None
        if options.energy != "raw" and self.text is not None:
            every, text_sums = self.text
            text = text_sums.energy / text_sums.count
        return visual_energy(every.energy / every.count, text, options.energy)

    def enriched(self) -> dict[str, Enrichment]:
        """Relation -> enrichment against the neutral questions, and that of all relations together."""
        everything = {SPATIAL: total(list(self.relations.values())), **self.relations}
        return {name: enrichment(sums, self.neutral) for name, sums in everything.items()}


def total(parts: Sequence[Sums]) -> Sums:
    """The sums over the tokens of all parts."""
    return Sums(*(np.sum([np.asarray(part[i]) for part in parts], 0) for i in range(len(Sums._fields))))


class Filtered(NamedTuple):
    """Which latents of a dictionary pass which filter."""

    adapted: Bool[np.ndarray, " latents"]
    lexical: Bool[np.ndarray, " latents"]
    enriched: dict[str, dict[str, Bool[np.ndarray, " latents"]]]
    """Relation -> filter (odds_ratio, difference, q) -> latents."""

    def spatial(self, relation: str) -> Bool[np.ndarray, " latents"]:
        """The latents that pass all three filters of a relation."""
        return np.logical_and.reduce(list(self.enriched[relation].values()))

    def chosen(self, relation: str) -> Bool[np.ndarray, " latents"]:
        """The latents that pass every filter."""
        return self.adapted & self.spatial(relation) & self.lexical

    def survivors(self, relation: str) -> dict[str, int]:
        """How many latents are left after each filter, in P2's order."""
        steps: dict[str, Bool[np.ndarray, " latents"]] = {"adapted": self.adapted, **self.enriched[relation]}
        steps["lexical"] = self.lexical
        left, counts = np.ones(len(self.adapted), bool), {"all": len(self.adapted)}
        for name, passed in steps.items():
            left = left & passed
            counts[name] = int(left.sum())
        return counts


def filtered(
    measured: Mapping[Place, Measured], options: FilterOptions, limits_of: Mapping[Place, Measured] | None = None
) -> dict[Place, Filtered]:
    """Applies the filters to every dictionary.

    Args:
        limits_of: the dictionaries whose cosines set the limits of adapted latents; None for ``measured`` themselves. A
            control is held to the limits of what it controls.
    """
    reference = measured if limits_of is None else limits_of
    adapted = adapted_latents(
        {place: one.rotation.cosine for place, one in measured.items()},
        {place: one.energy(options) for place, one in measured.items()},
        cosine_limits({p: one.rotation.cosine for p, one in reference.items()}, options.percentile, options.pooled),
        options.least_energy,
    )
    limits = options.least_ratio, options.least_difference, options.level
    return {
        place: Filtered(
            adapted[place],
            one.lexical >= options.least_share,
            {name: found.selected(*limits) for name, found in one.enriched().items()},
        )
        for place, one in measured.items()
    }


class Feature(NamedTuple):
    """A latent that is traced and removed."""

    place: Place
    latent: int
    relation: str
    """The relation whose questions selected it."""
    selection: str
    """How it was selected: "full", or a null."""


def choose(
    measured: Mapping[Place, Measured], passed: Mapping[Place, Filtered], options: FilterOptions, count: int, seed: int
) -> list[Feature]:
    """Features of every relation: up to ``count`` of those that pass every filter, with the largest difference of
    rates, and for each of the nulls as many.

    The nulls: "random": any latents that are active at all. "energy": those with the largest visual energy. "no
    lexical": those that pass every filter but the lexical one, which they fail.
    """
    rng, features = np.random.default_rng(seed), []
    relations = [name for name in next(iter(measured.values())).enriched() if name != SPATIAL]

    def ranked(score: Mapping[Place, np.ndarray], allowed: Mapping[Place, np.ndarray], limit: int) -> list:
        rows = [
            (-float(score[place][latent]), place, int(latent))
            for place in measured
            for latent in np.flatnonzero(allowed[place])
        ]
        return [(place, latent) for _, place, latent in sorted(rows, key=lambda row: (row[0], str(row[1]), row[2]))][
            :limit
        ]

    active = {place: np.asarray(one.all_questions().active) > 0 for place, one in measured.items()}
    energy = {place: one.energy(options) for place, one in measured.items()}
    by_energy = ranked(energy, active, count)
    for relation in relations:
        found = {place: one.enriched()[relation] for place, one in measured.items()}
        difference = {place: one.rate - one.neutral for place, one in found.items()}
        full = ranked(difference, {p: one.chosen(relation) for p, one in passed.items()}, count)
        unlexical = {p: one.adapted & one.spatial(relation) & ~one.lexical for p, one in passed.items()}
        everywhere = [(place, int(latent)) for place in measured for latent in np.flatnonzero(active[place])]
        drawn = rng.choice(len(everywhere), min(count, len(everywhere)), replace=False)
        selections = {
            "full": full,
            "no lexical": ranked(difference, unlexical, count),
            "energy": by_energy,
            "random": [everywhere[row] for row in drawn],
        }
        features += [
            Feature(place, latent, relation, name) for name, rows in selections.items() for place, latent in rows
        ]
    return features


def feature_table(
    measured: Mapping[Place, Measured], passed: Mapping[Place, Filtered], options: FilterOptions
) -> pa.Table:
    """A row for each latent, for ``features.parquet``."""
    tables = []
    for place, one in measured.items():
        enriched, count = one.enriched(), len(one.lexical)
        columns: dict[str, Any] = {
            "site": [place.site] * count,
            "layer": pa.array([place.layer] * count, pa.int32()),
            "seed": pa.array([place.seed] * count, pa.int32()),
            "latent": np.arange(count),
            **one.rotation._asdict(),
            "energy": one.energy(options),
            "adapted": passed[place].adapted,
            "neutral_rate": enriched[SPATIAL].neutral,
            "lexical_share": one.lexical,
            "lexical": passed[place].lexical,
        }
        for name, found in enriched.items():
            columns |= {f"{name}.{field}": getattr(found, field) for field in ("rate", "odds_ratio", "q")}
            columns[f"{name}.chosen"] = passed[place].chosen(name)
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)
