"""Dictionaries of one model in a run folder: trained or read, measured, drawn. The command train.sae has one such
stage, P2's study several."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from interventions.dictionary import Dictionary
from interventions.diff.activations import ActivationOptions, Computed, Shuffled
from interventions.diff.artifacts import QUALITY
from interventions.diff.dictionaries import Stored, load_dictionaries, load_dictionary, save_dictionary
from interventions.diff.place import Place
from interventions.diff.quality import Loss, Sums, measure, splice_losses
from interventions.diff.saved import Saved, save_activations
from interventions.figures.base import save_figure
from interventions.figures.diff import explained
from train.artifacts import DICTIONARY_STEPS, training_log
from train.dictionaries import DictionaryOptions, Outcome, train_dictionaries
from train.loop import forget
from vlm_jax import Model
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import first
from vlm_jax.sites import layered

#: The token groups by which quality is reported, where they occur.
_GROUPS = ("all", "image", "text", "question")
#: Reconstructions are spliced in on at most so many held-out examples, which are drawn at random: each takes a forward
#: pass for every dictionary.
_SPLICED = 200


@dataclasses.dataclass(frozen=True)
class StageOptions(DictionaryOptions, ActivationOptions):
    """Which activations are read, and how dictionaries are trained on them."""

    store: Literal["no", "float32", "bfloat16"] = "no"
    """Whether activations are written to the disk, and in which precision. no: they are computed again in every epoch,
    which needs no space."""


class Stage(NamedTuple):
    """The dictionaries of one model in a folder of a run."""

    run: Run
    folder: str
    """A folder inside the run folder: "" for the run folder itself, else a path that ends in "/"."""
    options: StageOptions
    name: str
    """The model's name."""
    model: Model
    processor: Processor
    train: Sequence[Example]
    held_out: Sequence[Example]
    start: Mapping[Place, Dictionary] | None = None
    """Place, with its seed if there are several -> the dictionary with which training begins; None for random ones."""

    def dictionaries(self) -> dict[Place, Stored]:
        """Trains the dictionaries, or reads those of an earlier session. Those that broke off are left out."""
        made = ", ".join(map(str, places_of(self.options, self.model)))
        artifact = Artifact("dictionaries", f"Dictionaries of {self.name}: {made}")
        name, model = f"{self.folder}dictionaries", fingerprint(self.model)  # by all processes together
        write = functools.partial(self.write, model)
        self.run.once(name, self.trained, artifact, write=write, read=lambda path: None)
        forget(self.run.folder / self.folder / "training", self.options)
        return load_dictionaries(self.run.folder / self.folder)

    def trained(self) -> Outcome:
        """The dictionaries after training."""
        first(self.run.begin)  # before the training writes its log and checkpoints
        options = self.options
        if jax.process_count() > 1 and options.store == "no":
            raise UserError("several processes need stored activations: give --store float32 or bfloat16")
        computed = Computed.of(self.model, self.processor, self.train, options)
        source = computed if options.store == "no" else self.stored(computed)
        read = Shuffled(source, options.batch, buffer=options.buffer, seed=next(iter(options.seeds)))
        folder = self.run.path(f"{self.folder}training/_").parent
        places = places_of(options, self.model)
        outcome = train_dictionaries(read, places, options, start=self.start, folder=folder)
        log = training_log(f"dictionaries of {self.name}", DICTIONARY_STEPS)
        self.run.add(f"{self.folder}training/metrics.jsonl", log)
        return outcome

    def stored(self, computed: Computed) -> Saved:
        """The activations, from the run folder's store, which is written if it is not there."""
        assert self.options.store != "no", "only stored activations come from the disk"
        folder = self.run.path(f"{self.folder}training/activations/_").parent
        ids = hashlib.sha256("\n".join(example.id for example in self.train).encode()).hexdigest()[:16]
        facts = {"model": fingerprint(self.model), "data": ids}
        return save_activations(folder, computed, self.options.store, facts)

    def write(self, model: str, folder: Path, outcome: Outcome) -> None:
        """Writes the dictionaries that were trained to the end, with the model's fingerprint. The first process does
        it alone."""
        for place, dictionary in outcome.dictionaries.items():
            if outcome.alive[place]:
                facts = {"model": model, "model_name": self.name, "sparsity": outcome.sparsity[place]}
                save_dictionary(folder / str(place), dictionary, place, **facts)

    def measured(self, stored: Mapping[Place, Stored]) -> dict:
        """What the dictionaries explain of the held-out examples: the content of ``results.json``."""
        dictionaries = {place: one.dictionary for place, one in stored.items()}

        def make() -> dict:
            everything = dataclasses.replace(self.options, tokens="all")
            source = Computed.of(self.model, self.processor, self.held_out, everything)
            sums = measure(source, dictionaries)
            tokens = self.options.tokens
            drawn = np.sort(np.random.default_rng(0).permutation(len(self.held_out))[:_SPLICED])
            spliced = [self.held_out[row] for row in drawn]
            losses = splice_losses(self.model, self.processor, spliced, dictionaries, tokens=tokens)
            wanted = members(places_of(self.options, self.model), self.options.seeds)
            return {
                "examples": len(self.held_out),
                "spliced": len(spliced),
                "broke_off": [str(place) for place in wanted if place not in dictionaries],
                "dictionaries": {str(place): _quality(sums[place], losses[place]) for place in dictionaries},
            }

        title = "What the dictionaries explain of held-out activations"
        results = self.run.once(f"{self.folder}results.json", make, Artifact("metrics", title, QUALITY))
        self.draw(results, dictionaries)
        return results

    def draw(self, results: dict, dictionaries: Mapping[Place, Dictionary]) -> None:
        """Draws FVU by layer, for sites with several layers."""
        fvu, layers = {}, {}
        for site in sorted({place.site for place in dictionaries}):
            places = [place for place in dictionaries if place.site == site and place.layer is not None]
            depth = sorted({place.layer for place in places if place.layer is not None})
            seeds = sorted({place.seed for place in places}, key=lambda seed: (seed is not None, seed))
            whole = len(places) == len(depth) * len(seeds)  # none of them broke off
            if len(depth) < 2 or not whole:
                continue
            names = [[str(Place(site, layer, seed)) for layer in depth] for seed in seeds]
            found = results["dictionaries"]
            groups = found[names[0][0]]["fvu"]
            fvu[site] = {g: [[found[name]["fvu"][g] for name in of_seed] for of_seed in names] for g in groups}
            layers[site] = depth
        if fvu:
            title = "Variance that the dictionaries leave unexplained"
            save_figure(self.run, f"{self.folder}fvu", explained, title, fvu=fvu, layers=layers)


def places_of(options: ActivationOptions, model: Model) -> list[Place]:
    """The places of the activations, in the order in which training reads them."""
    return [
        Place(site, layer)
        for site in sorted(options.sites)
        for layer in (options.layers_of(model) if layered(site) else (None,))
    ]


def members(places: Sequence[Place], seeds: Sequence[int]) -> list[Place]:
    """Every place with every seed. A single seed is not part of the names."""
    several = len(seeds) > 1
    return [place._replace(seed=seed if several else None) for seed in seeds for place in places]


def _quality(sums: Sums, loss: Loss) -> dict:
    """The measures of one dictionary."""
    groups = {name: part for name in _GROUPS if (part := sums.of(name)).count > 0}
    tokens = float(sums.of("all").count)
    return {
        "fvu": {name: part.fvu() for name, part in groups.items()},
        "published_fvu": {name: part.published_fvu(tokens) for name, part in groups.items()},
        "l0": {name: float(part.active.sum() / part.count) for name, part in groups.items()},
        "dead": float((sums.of("all").active == 0).mean()),
        "loss": {name: float(np.mean(values)) for name, values in loss._asdict().items()},
        "recovered": loss.recovered(),
    }


def show(results: dict) -> None:
    """Prints a line for each dictionary."""
    found = results["dictionaries"]
    if results["broke_off"]:
        print(f"broke off, because its loss stopped being a number: {', '.join(results['broke_off'])}")
    groups = list(next(iter(found.values()))["fvu"])
    print(f"{'dictionary':28s}" + "".join(f"FVU {group:9s}" for group in groups) + "L0 all  dead   loss recovered")
    for name, one in found.items():
        fvu = "".join(f"{one['fvu'][group]:<13.3f}" for group in groups)
        recovered = "unknown" if one["recovered"] is None else f"{one['recovered']:.3f}"
        print(f"{name:28s}{fvu}{one['l0']['all']:<7.1f} {one['dead']:.3f}  {recovered}")


def begin_with(folder: Path, places: Sequence[Place], seeds: Sequence[int]) -> dict[Place, Stored]:
    """The dictionaries of a run folder with which members begin: each with its seed's, or with the only one.

    Raises:
        UserError: if one is missing.
    """
    found = {}
    stored = {Place.parse(path.name): path for path in sorted((folder / "dictionaries").glob("*"))}
    taken: dict[Path, Place] = {}
    for member in members(places, seeds):
        seeded = [member._replace(seed=seed) for seed in (seeds[0] if member.seed is None else member.seed, None)]
        path = next((stored[place] for place in seeded if place in stored), None)
        if path is None:
            raise UserError(
                f"--init {folder} has no dictionary of {member}: name the --out of a train.sae with these --sites, "
                "--layers and --seeds"
            )
        if path in taken:
            raise UserError(
                f"--init {folder} has one dictionary for {taken[path]} and {member}, which would stay equal: train it "
                "with the same --seeds"
            )
        taken[path] = member
        found[member] = load_dictionary(path)
    return found
