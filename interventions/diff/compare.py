"""Compares dictionaries of two stages: features, what they belong to, what drives them and what they do."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from interventions.dictionary import Dictionary
from interventions.diff.ablation import Answered, answer_under, with_directions, without_directions
from interventions.diff.activations import ActivationOptions, Computed
from interventions.diff.artifacts import ABLATIONS, FEATURES, HEADS, RESULTS
from interventions.diff.dictionaries import Stored
from interventions.diff.features import rotation
from interventions.diff.heads import agreement, head_scores, mean_image_embedding
from interventions.diff.maps import feature_maps
from interventions.diff.options import CompareOptions
from interventions.diff.place import Place
from interventions.diff.quality import Sums, measure
from interventions.diff.report import ablation_rows, ablation_summary, agreement_rows, head_rows
from interventions.diff.selection import (
    SAME,
    Feature,
    Filtered,
    Measured,
    active_share,
    by_relation,
    choose,
    clusters,
    feature_table,
    filtered,
    halves,
    with_prompts,
)
from interventions.figures import diff as figures
from interventions.figures.base import save_figure
from interventions.statistics import write_rows
from vlm_jax import Model
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.configuration import file_digest
from vlm_jax.runs.folder import Run
from vlm_jax.runs.token_maps import TOKEN_MAPS, TokenMap, write_token_maps
from vlm_jax.sites import Intervention

#: Sites whose values are in the residual stream, or are added to it.
RESIDUAL = (
    "text.resid_post",
    "text.attn_out",
    "text.mlp_out",
    "text.resid_pre",
    "text.resid_mid",
    "text.embeddings",
)


class Compared(NamedTuple):
    """The dictionaries that are compared, by place."""

    base: Mapping[Place, Stored]
    adapted: Mapping[Place, Stored]
    """Adapted from ``base`` to the vision-language model."""
    data_only: Mapping[Place, Stored] | None = None
    """Adapted from ``base`` to the text model's own activations on the same questions; None without this control."""

    def check(self, model: Model) -> None:
        """Raises a UserError for dictionaries of other places, or of another model."""
        for name, found in (("--base", self.base), ("--data-only", self.data_only)):
            if found is not None and found.keys() != self.adapted.keys():
                raise UserError(
                    f"{name} and --adapted have dictionaries of other sites, layers or seeds: train them alike"
                )
        own = fingerprint(model)
        for place, stored in self.adapted.items():
            if place.site not in RESIDUAL:
                raise UserError(
                    f"the dictionary of {place} is not of the residual stream, from which directions are removed: use "
                    f"sites such as {', '.join(RESIDUAL[:3])}"
                )
            if stored.model not in (None, own):
                raise UserError(
                    f"--adapted was trained on another model (fingerprint {stored.model}, this one has {own}): load "
                    "that model"
                )
            rotation(self.base[place].dictionary, stored.dictionary)  # refuses other shapes
            for name, found in (("--base", self.base), ("--data-only", self.data_only)):
                if found is not None and found[place].model == own:
                    raise UserError(f"{name} was trained on {place} of this very model: name the run on the text model")
            if stored.dictionary.width != model.config.text.hidden_size:
                raise UserError(
                    f"the dictionary of {place} is for a width of {stored.dictionary.width}, not this model's"
                )


class Comparison(NamedTuple):
    """What a comparison reads, and where it writes."""

    run: Run
    folder: str
    """A folder inside the run folder: "" for the run folder itself, else a path that ends in "/"."""
    options: CompareOptions
    model: Model
    processor: Processor
    text_model: tuple[Model, Processor] | None
    """For --energy ratio and share."""
    compared: Compared
    spatial: list[Example]
    neutral: list[Example]
    interventions: tuple[Intervention, ...] = ()
    """Those that act on the model in every run."""

    def results(self) -> dict:
        """Runs it and writes its files; the content of ``results.json``."""
        run, folder, options, compared = self.run, self.folder, self.options, self.compared
        if options.steer is not None and len({place.site for place in compared.adapted}) > 1:
            raise UserError("--steer needs dictionaries of one site: train and compare those of each site alone")
        selecting, measuring = halves(self.spatial)
        neutral = halves(self.neutral)
        measured = self.measured(selecting, neutral[0])
        passed = filtered(measured, options)
        every = feature_table(measured, passed, options)
        write = functools.partial(pq.write_table, every, compression="zstd")
        run.write(f"{folder}features.parquet", write, Artifact("table", "Every latent", FEATURES))
        features = choose(measured, passed, options, options.features, options.seed)
        # A latent that several relations or selections chose is removed once.
        latents = list(dict.fromkeys((f.place, f.latent) for f in features))
        of = [latents.index((f.place, f.latent)) for f in features]
        directions = np.stack([compared.adapted[place].dictionary.W_dec[latent] for place, latent in latents])
        changes = self.changes([place for place, _ in latents], directions)
        spatial, others = (
            self.answered(examples, changes, name).take(of)
            for name, examples in (("spatial", measuring), ("neutral", neutral[1]))
        )
        relations = [str(example.subtask) for example in measuring]
        groups = clusters(measuring), clusters(neutral[1])
        ablations = ablation_rows(features, spatial, relations, others, groups, options.seed)
        title = f"Answers {self.how.replace('direction', 'feature')}, on the half that did not select"
        self.table("ablations.parquet", ablations, Artifact("table", title, ABLATIONS))
        traced, agreed = self.traced(measuring, features)
        if traced:
            self.table("heads.parquet", traced, Artifact("table", "What each head adds to each feature", HEADS))
        self.maps(measuring, features)
        control = compared.data_only
        results = {
            "adapted": {
                str(place): {
                    "share": float(passed[place].adapted.mean()),
                    "cosine": float(one.rotation.cosine.mean()),
                    "relocated": one.rotation.relocated,
                }
                for place, one in measured.items()
            },
            "survivors": _survivors(passed),
            "data_only": {} if control is None else self.control_survivors(measured, control),
            "agreement": agreed,
            "ablations": ablation_summary(ablations),
        }
        run.save_json(f"{folder}results.json", results, Artifact("metrics", "What was found", RESULTS))
        save_figure(
            run,
            f"{folder}rotation",
            figures.rotated,
            "Cosine between each latent's direction before and after, and its visual energy",
            cosine={str(place): one.rotation.cosine for place, one in measured.items()},
            energy={str(place): one.energy(options) for place, one in measured.items()},
            adapted={str(place): np.flatnonzero(one.adapted) for place, one in passed.items()},
        )
        shown = [row for row in ablations if row["selection"] == "full"] or ablations
        title = f"Change of accuracy {self.how.replace('direction', 'feature')}"
        save_figure(run, f"{folder}ablations", figures.ablated, title, rows=shown)
        return results

    def maps(self, examples: list[Example], features: list[Feature]) -> None:
        """Writes where the features that pass every filter are active; if none does, where the nulls are."""
        shown = [f for f in features if f.selection == "full"] or features
        dictionaries = self.compared.adapted

        def write(path: Path, made: tuple[list[TokenMap], list[str]]) -> None:
            write_token_maps(path, made[0], value="activation", series=made[1])

        self.run.once(
            f"{self.folder}token_maps",
            lambda: feature_maps(self.model, self.processor, examples, shown, dictionaries, self.interventions),
            Artifact("token_maps", "Samples in which features are most active", TOKEN_MAPS),
            write=write,
            read=lambda path: None,
        )

    def survivors(self) -> dict[str, dict[str, int]]:
        """Relation -> filter -> how many latents are left after it."""
        selecting, neutral = halves(self.spatial)[0], halves(self.neutral)[0]
        return _survivors(filtered(self.measured(selecting, neutral), self.options))

    def table(self, name: str, rows: list[dict], artifact: Artifact) -> None:
        """Writes a Parquet table."""
        self.run.write(f"{self.folder}{name}", lambda path: write_rows(path, rows), artifact)

    def measured(self, spatial: list[Example], neutral: list[Example]) -> dict[Place, Measured]:
        """What was measured of every adapted dictionary, on the half that selects."""
        args, compared = self.options, self.compared
        dictionaries = {place: stored.dictionary for place, stored in compared.adapted.items()}
        options = ActivationOptions(
            sites=tuple(sorted({place.site for place in dictionaries})),
            layers=tuple(sorted({place.layer for place in dictionaries if place.layer is not None})) or None,
            activation_batch=args.activation_batch,
        )

        def sums(
            model: Model,
            processor: Processor,
            examples: Sequence[Example],
            title: str,
            tokens: str = args.tokens,
            acting: tuple[Intervention, ...] = self.interventions,
        ) -> dict[Place, Sums]:
            computed = Computed.of(model, processor, examples, options, acting)
            return {place: one.of(tokens) for place, one in measure(computed, dictionaries, title).items()}

        def make() -> dict[str, np.ndarray]:
            own = self.model, self.processor
            found = {name: sums(*own, part, name) for name, part in by_relation(spatial).items()}
            found["neutral"] = sums(*own, neutral, "neutral")
            if self.text_model is not None:
                both = [*spatial, *neutral]
                blind = [example.without_images() for example in both]
                found["same"] = sums(*own, both, "questions", SAME)
                found["text"] = sums(*self.text_model, blind, "text model", SAME, ())
            pictures = Computed.of(*own, with_prompts(spatial, args.neutral_prompts), options, self.interventions)
            arrays = {f"lexical/{p}": share for p, share in active_share(pictures, dictionaries, args.tokens).items()}
            for name, of_places in found.items():
                for place, one in of_places.items():
                    arrays |= {f"{name}/{place}/{field}": np.asarray(a) for field, a in one._asdict().items()}
            return arrays

        title = "Activity of every latent on the half that selects"
        arrays = self.run.once(f"{self.folder}activity.npz", make, Artifact("arrays", title))

        def read(name: str, place: Place) -> Sums:
            return Sums(*(arrays[f"{name}/{place}/{field}"] for field in Sums._fields))

        return {
            place: Measured(
                rotation(compared.base[place].dictionary, dictionaries[place]),
                {name: read(name, place) for name in by_relation(spatial)},
                read("neutral", place),
                None if self.text_model is None else (read("same", place), read("text", place)),
                arrays[f"lexical/{place}"],
            )
            for place in dictionaries
        }

    def control_survivors(self, measured: Mapping[Place, Measured], control: Mapping[Place, Stored]) -> dict:
        """How many latents are left after each filter if the control's cosines decide which are adapted, within the
        limits of the real adaptation."""
        return _survivors(filtered(self.with_cosines(measured, control), self.options, limits_of=measured))

    def with_cosines(self, measured: Mapping[Place, Measured], other: Mapping[Place, Stored]) -> dict[Place, Measured]:
        """The same measurements with the cosines of other adapted dictionaries, such as the data-only control."""
        base = self.compared.base
        return {
            place: one._replace(rotation=rotation(base[place].dictionary, other[place].dictionary))
            for place, one in measured.items()
        }

    def changes(self, places: Sequence[Place], directions: np.ndarray) -> Sequence[Any]:
        """The intervention on each direction: it is removed, or with --steer more of it is added."""
        depth, options = self.model.depths["text"], self.options
        if options.steer is None:
            return without_directions(depth, directions, options.tokens)
        return with_directions(depth, places, directions, options.steer, options.tokens)

    def answered(self, examples: list[Example], changes: Sequence[Any], name: str) -> Answered:
        """The answers under each intervention."""
        batch = max(1, self.options.activation_batch // 2)

        def make() -> dict[str, np.ndarray]:
            how = {"base": self.interventions, "batch": batch, "label": name}
            return answer_under(self.model, self.processor, examples, changes, **how)._asdict()

        title = f"Log-odds of yes on {name} questions, as they are and {self.how}"
        return Answered(**self.run.once(f"{self.folder}{name}-answers.npz", make, Artifact("arrays", title)))

    @property
    def how(self) -> str:
        """What is done to a feature's direction, in words."""
        steer = self.options.steer
        return "without each direction" if steer is None else f"with {steer:g} more of each direction"

    def traced(self, examples: list[Example], features: list[Feature]) -> tuple[list[dict], list[dict]]:
        """The heads of the features that pass every filter, and how well attribution agrees with exact patching."""
        args, on = self.options, (self.model, self.processor)
        full = [f for f in features if f.selection == "full" and f.place.site == "text.resid_post"]
        ordered = sorted(full, key=lambda f: (f.relation, str(f.place), f.latent))
        rows, agreed, mean = [], [], None
        for (relation, place), group in itertools.groupby(ordered, key=lambda f: (f.relation, f.place)):
            chosen = list(group)
            mean = mean_image_embedding(*on, examples, base=self.interventions) if mean is None else mean
            asked = [example for example in examples if example.subtask == relation][: args.head_limit]
            directions = np.stack([_unit(self.compared.adapted[place].dictionary, f.latent) for f in chosen])
            assert place.layer is not None, "residual streams are in the layers"
            how: dict[str, Any] = {"at": args.at, "steps": args.steps, "label": f"{relation}, layer {place.layer}"}
            how["base"] = self.interventions
            scores = head_scores(*on, asked, directions, place.layer, mean, **how)
            rows += head_rows(chosen, scores)
            agreed += agreement_rows(chosen, agreement(scores))
        return rows, agreed


def dictionaries_digest(folder: Path) -> dict[str, str]:
    """What tells the dictionaries of a run folder apart."""
    root = folder / "dictionaries"
    return {str(path.relative_to(root)): file_digest(path) for path in sorted(root.rglob("*")) if path.is_file()}


def _unit(dictionary: Dictionary, latent: int) -> np.ndarray:
    row = np.asarray(dictionary.W_dec[latent])
    return row / np.linalg.norm(row)


def _survivors(passed: Mapping[Place, Filtered]) -> dict[str, dict[str, int]]:
    """Relation -> filter -> how many latents of all dictionaries are left after it."""
    totals = {}
    for relation in next(iter(passed.values())).enriched:
        counts = [one.survivors(relation) for one in passed.values()]
        totals[relation] = {name: sum(count[name] for count in counts) for name in counts[0]}
    return totals
