"""Runs P2's study: dictionaries of every stage and control, the comparison, and how much of the truth is found."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from interventions.dictionary import Dictionary, fvu
from interventions.diff.ablation import truths
from interventions.diff.activations import ActivationOptions, Computed, Shuffled
from interventions.diff.compare import Compared, Comparison
from interventions.diff.crosscoder import TOKENS, Paired, second_share
from interventions.diff.dictionaries import Stored
from interventions.diff.features import rotation
from interventions.diff.options import CompareOptions
from interventions.diff.place import Place
from interventions.diff.selection import by_relation, halves
from train.dictionaries import DictionaryOptions, train_dictionaries
from train.dictionary_stage import Stage, StageOptions
from train.loop import LoopOptions
from train.study.artifacts import CROSSCODERS, RECALL
from train.study.diffing.options import Args
from train.study.diffing.recall import Half, Recall, Rows, auroc, best_of, random_dictionary, supervised
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import progress

SITE = "text.resid_post"
#: A crosscoder's latent belongs to a model if more than this share of its length is there (Lindsey et al. 2024).
_OF_SECOND = 0.7


class Condition(NamedTuple):
    """Dictionaries of one model, trained in one way."""

    name: str
    model: str
    """The model whose activations are read. A text-only model reads the questions alone."""
    adapts: bool
    """Whether training begins with the dictionaries of the text model, or with random ones."""
    tokens: str = "all"
    """The tokens whose activations are read."""


def conditions(args: Args) -> list[Condition]:
    """The dictionaries of the study; the first are those of the text model."""
    return [
        Condition("base", args.text_model, False),
        Condition("adapted", args.model, True),
        Condition("data only", args.text_model, True),
        Condition("from scratch", args.model, False),
        Condition("adapted, image tokens", args.model, True, "image"),
        Condition("adapted, text tokens", args.model, True, "text"),
        *(Condition(f"adapted to {stage}", stage, True) for stage in args.stages),
    ]


class Loaded(NamedTuple):
    """A model and its processor."""

    model: Model
    processor: Processor


class Study(NamedTuple):
    """What all parts share. Examples are those of the relations and the neutral ones."""

    args: Args
    run: Run
    models: Mapping[str, Loaded]
    train: tuple[list[Example], ...]
    test: tuple[list[Example], ...]

    def trained(self, condition: Condition, base: Mapping[Place, Stored] | None) -> tuple[dict[Place, Stored], dict]:
        """The dictionaries of a condition, and what they explain."""
        args, loaded = self.args, self.models[condition.model]
        train, held_out = ([*parts[0], *parts[1]] for parts in (self.train, self.test))
        if loaded.model.visual is None:
            train, held_out = ([example.without_images() for example in part] for part in (train, held_out))
        adapts = condition.adapts and base is not None
        options = StageOptions(
            sites=(SITE,),
            layers=args.layers,
            tokens=condition.tokens,
            activation_batch=args.activation_batch,
            latents=None if adapts else args.latents,
            k=None if adapts else args.k,
            seeds=args.seeds,
            epochs=args.epochs,
            batch=args.batch,
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(LoopOptions)},
        )
        start = None if not adapts or base is None else {place: one.dictionary for place, one in base.items()}
        folder = condition.name.replace(", ", "-").replace(" ", "-") + "/"
        stage = Stage(self.run, folder, options, condition.model, *loaded, train, held_out, start)
        stored = stage.dictionaries()
        return stored, stage.measured(stored)

    def compared(self, base: Mapping, adapted: Mapping, data_only: Mapping) -> dict:
        """The comparison of the first seed's dictionaries."""
        first = Compared(*(self.of_seed(found) for found in (base, adapted, data_only)))
        return self.comparison("diff/", first).results()

    def survivors(self, folder: str, base: Mapping, adapted: Mapping, seed: int | None = None) -> dict:
        """How many latents other dictionaries have left after each filter. ``seed``: None for the first."""
        return self.comparison(folder, Compared(self.of_seed(base, seed), self.of_seed(adapted, seed))).survivors()

    def comparison(self, folder: str, compared: Compared) -> Comparison:
        """A comparison of dictionaries of the text model and of the vision-language model."""
        args = self.args
        shared = {field.name for field in dataclasses.fields(args)}
        names = [field.name for field in dataclasses.fields(CompareOptions) if field.name in shared]
        options = CompareOptions(**{name: getattr(args, name) for name in names}, seed=args.seeds[0])
        own, text = self.models[args.model], self.models[args.text_model]
        compared.check(own.model)
        spatial, neutral = self.test
        return Comparison(self.run, folder, options, *own, text, compared, spatial, neutral)

    def of_seed(self, found: Mapping[Place, Stored], seed: int | None = None) -> dict[Place, Stored]:
        """The dictionaries of a seed, by default the first, without the seed in their names."""
        seed = self.args.seeds[0] if seed is None else seed
        return {place._replace(seed=None): one for place, one in found.items() if place.seed in (None, seed)}

    def features(self) -> dict[str, list[tuple[int, int]]]:
        """Relation -> (layer, latent) of the latents that passed every filter of the comparison."""
        table = pq.read_table(self.run.folder / "diff/features.parquet").to_pylist()
        found: dict[str, list[tuple[int, int]]] = {}
        for row in table:
            for relation in by_relation(self.test[0]):
                if row[f"{relation}.chosen"]:
                    found.setdefault(relation, []).append((row["layer"], row["latent"]))
        return found

    def recalled(
        self, adapted: Mapping[Place, Stored], features: Mapping[str, Sequence[tuple[int, int]]]
    ) -> list[dict]:
        """For each relation and layer, how close the features come to what is known.

        Args:
            features: relation -> (layer, latent) of those that passed every filter.
        """
        args, own = self.args, self.models[self.args.model]

        def make() -> list[dict]:
            options = ActivationOptions((SITE,), args.layers, activation_batch=args.activation_batch)
            asked = {"train": self.train[0], "test": measuring_half(self.test[0])}
            halves = [Rows.of(Computed.of(*own, part, options), "text", split) for split, part in asked.items()]
            first, records = self.of_seed(adapted), []
            todo = list(enumerate(args.layers))
            for number, layer in progress(todo, desc="recall", unit="layer", leave=False):
                if Place(SITE, layer) not in first:
                    continue  # it broke off
                one = first[Place(SITE, layer)].dictionary
                records += self.recalled_at(number, layer, one, halves, features)
            return records

        return self.run.once("auroc.json", make, Artifact("metrics", "Recall of what is known", RECALL))

    def crosscoded(self) -> list[dict]:
        """For each layer, a crosscoder of the text model and the vision-language model: whose its latents are, and for
        each relation how well the best of them tell whether it holds."""
        args, pair = self.args, (self.models[self.args.text_model], self.models[self.args.model])
        options = ActivationOptions((SITE,), args.layers, activation_batch=args.activation_batch)
        places = [Place(SITE, layer) for layer in args.layers]

        def make() -> list[dict]:
            source = Paired.of(*pair, [*self.train[0], *self.train[1]], options)
            read = Shuffled(source, args.batch, seed=args.seeds[0])
            how: dict[str, Any] = {"latents": args.latents, "k": args.k, "epochs": args.epochs, "batch": args.batch}
            training = DictionaryOptions(activation="batchtopk", seeds=args.seeds[:1], **how)
            outcome, records = train_dictionaries(read, places, training), []
            asked = self.train[0], measuring_half(self.test[0])
            pairs = [Paired.of(*pair, part, options, source.scales) for part in asked]
            halves = [Rows.of(one, TOKENS, "pairs") for one in pairs]
            for number, place in enumerate(places):
                if outcome.alive[place]:
                    records.append(self.crosscoder_record(number, outcome.dictionaries[place], halves, asked))
            return records

        return self.run.once("crosscoder.json", make, Artifact("metrics", "Crosscoders", CROSSCODERS))

    def crosscoder_record(
        self, number: int, crosscoder: Dictionary, halves: Sequence[Rows], asked: Sequence[Sequence[Example]]
    ) -> dict:
        """The record of one layer's crosscoder."""
        share, x = second_share(crosscoder), halves[1].x[number]
        width = crosscoder.width // 2
        guess = np.asarray(crosscoder(x))
        errors = [float(fvu(x[:, part], guess[:, part])) for part in (slice(width), slice(width, None))]
        codes = [rows.mean_codes(crosscoder, number) for rows in halves]
        own, relations = np.flatnonzero(share > _OF_SECOND), {}
        for relation in by_relation(asked[1]):
            chosen = [np.array([example.subtask == relation for example in part]) for part in asked]
            parts = codes[0][chosen[0]], codes[1][chosen[1]]
            selecting, measuring = (Half(parts[i], truths(asked[i])[chosen[i]]) for i in (0, 1))
            relations[relation] = {
                "best": best_of(parts, selecting, measuring),
                "own": best_of(parts, selecting, measuring, own.tolist()),
            }
        return {
            "layer": self.args.layers[number],
            "fvu": dict(zip(("text model", "vision-language model"), errors, strict=True)),
            "latents": {
                "text model": int((share < 1 - _OF_SECOND).sum()),
                "both": int(((share >= 1 - _OF_SECOND) & (share <= _OF_SECOND)).sum()),
                "vision-language model": len(own),
            },
            "auroc": relations,
        }

    def recalled_at(
        self,
        number: int,
        layer: int,
        dictionary: Dictionary,
        halves: Sequence[Rows],
        features: Mapping[str, Sequence[tuple[int, int]]],
    ) -> list[dict]:
        """The records of one layer."""
        mean = halves[0].x[number].mean(0)
        codes = [rows.mean_codes(dictionary, number) for rows in halves]
        drawn = []
        for seed in range(self.args.random):
            like = random_dictionary(dictionary, mean, seed)
            drawn.append([rows.mean_codes(like, number) for rows in halves])
        x, records = [rows.mean(rows.x[number]) for rows in halves], []
        asked = self.train[0], measuring_half(self.test[0])
        for relation in by_relation(asked[1]):
            chosen = [np.array([example.subtask == relation for example in part]) for part in asked]
            holds = [truths(part) for part in asked]
            selecting, measuring = (Half(x[i][chosen[i]], holds[i][chosen[i]]) for i in (0, 1))

            def best(of: Sequence[np.ndarray], among: Sequence[int] | None = None) -> float | None:
                parts = of[0][chosen[0]], of[1][chosen[1]]  # noqa: B023 (called in the same pass)
                return best_of(parts, selecting, measuring, among)  # noqa: B023

            latents = [latent for where, latent in features.get(relation, ()) if where == layer]
            # A dictionary without any active latent tells nothing, as chance does.
            own, *random = (0.5 if (value := best(one)) is None else value for one in (codes, *drawn))
            ceiling = auroc(measuring.x @ supervised(selecting), measuring.holds)
            as_good = float(np.mean(np.array(random) >= own))
            found = Recall(ceiling, best(codes, latents) if latents else None, own, random, as_good)
            records.append({"layer": layer, "relation": relation, "samples": len(measuring.holds), **found._asdict()})
        return records


def measuring_half(examples: Sequence[Example]) -> list[Example]:
    """The questions that selected nothing."""
    return halves(examples)[1]


def check_answers(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Raises a UserError if a relation lacks one of the two answers where recall is measured."""
    for relation, part in by_relation(measuring_half(test)).items():
        for examples in (part, by_relation(train).get(relation, [])):
            if len(set(truths(examples).tolist())) < 2:
                raise UserError(
                    f"the relation {relation!r} has too few questions for both answers: give a larger --limit"
                )


def between_seeds(found: Mapping[Place, Stored], seeds: Sequence[int]) -> dict[int, float]:
    """Layer -> the mean cosine between a latent of the first seed and the most similar one of the second."""
    if len(seeds) < 2:
        return {}
    first, second = (
        {place.layer: one.dictionary for place, one in found.items() if place.seed == seed} for seed in seeds[:2]
    )
    layers = [layer for layer in first if layer is not None and layer in second]
    return {layer: float(rotation(second[layer], first[layer]).nearest_cosine.mean()) for layer in layers}
