"""P0's experiment on one model: traces, scores of modules, adapters, and their accuracy.

Each result is written to the run folder before the next one is begun, and later sessions read it there.
:mod:`train.lora` runs the experiment for one placement, :mod:`train.study` for many.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from eval.evaluation import AnswerOptions, evaluate
from eval.judging import MetricOptions
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.kinds.lora import LoRA
from interventions.modules import folder_name, module_names, tower_names
from interventions.placement.adapters import adapter_parameters, init_lora, load_peft, merge, save_peft
from interventions.placement.rules import Scoring
from interventions.placement.scores import SCORES, corrupter, module_sizes
from interventions.trace.options import TraceOptions
from interventions.trace.result import by_module
from interventions.trace.tracing import trace_task
from train.adapter import LoRAOptions
from train.artifacts import training_log
from train.loop import forget
from train.study.artifacts import MODULE_SCORES
from train.tower import train_tower_lora
from train.trunk import Trunk, embedded_examples, train_lora
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches, check_fit
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, its examples, the options of the experiment, and the folder for the results."""

    run: Run
    folder: str
    """The folder inside the run folder: "" for the run folder itself, else a path that ends in "/"."""
    model: Model
    processor: Processor
    traced: dict[str, list[Example]]
    """Family -> examples to trace."""
    trained: dict[str, list[Example]]
    """Family -> examples to train on."""
    tested: dict[str, list[Example]]
    """Family -> held-out examples."""
    tracing: TraceOptions
    training: LoRAOptions
    metric: MetricOptions
    answering: AnswerOptions

    def check(self) -> None:
        """Raises a UserError for wrong options, or for an example that does not fit the model. Call it before any long
        computation."""
        self.training.check_loop()
        for examples in (*self.traced.values(), *self.trained.values(), *self.tested.values()):
            check_fit(examples, self.processor, self.model.config)

    @property
    def depth(self) -> int:
        return self.model.config.text.num_hidden_layers

    def trace(self, family: str, **changed) -> dict:
        """The summary of a family's trace. ``changed`` are trace options that differ from the experiment's."""
        options = dataclasses.replace(self.tracing, **changed)
        folder = f"{self.folder}trace/{options.corruption}/{family}/" if changed else f"{self.folder}trace/{family}/"
        return trace_task(self.run, folder, self.model, self.processor, family, self._traced(family), options)

    def scores(self, name: str, family: str) -> Float[np.ndarray, "layers 2"]:
        """The score of every layer's attention and MLP. ``name`` is "rr" (the restoration rate of the trace) or a name
        in :data:`interventions.placement.scores.SCORES`."""
        if name == "rr":
            return by_module(self.trace(family))

        def make() -> list:
            begun = time.perf_counter()
            score = self._score(name, family)
            self.run.timed(f"{self.folder}score {name} {family}", begun)
            return score.tolist()

        artifact = Artifact("arrays", f"{family}: {name} of every module", MODULE_SCORES)
        return np.array(self.run.once(f"{self.folder}scores/{name}/{family}.json", make, artifact))

    def scoring(self, names: Sequence[str], families: Sequence[str]) -> Scoring:
        """The facts from which placements choose modules, with these scores of these families."""
        known = {name: {family: self.scores(name, family) for family in families} for name in names}
        return Scoring(self.depth, module_sizes(self.model), known)

    def adapter_parameters(self, names: Sequence[str]) -> int:
        """The number of trainable parameters of LoRA on these modules."""
        return adapter_parameters(self.model, names, self.training.r, self.training.use_dora)

    def baseline(self, family: str) -> dict:
        """The held-out result of the model without LoRA; its fields are those of :meth:`cell`."""
        return self._evaluate(self.model, f"{self.folder}cells/{family}/baseline/", family)

    def cell(self, family: str, names: Sequence[str], seed: int) -> dict:
        """The held-out result of LoRA on these modules, trained with this seed.

        Returns:
            The result of :func:`eval.evaluation.evaluate`: ``accuracy``, ``stderr``, ``samples``, ``tasks``, and for
            each sample its entry in ``scores`` and ``clusters``.
        """
        folder = self._cell_folder(family, names, seed)
        tower = self.model.depths["visual"]
        label = f"{family} {folder_name(names, self.depth, tower)}"

        def make() -> LoRA:
            begun = time.perf_counter()
            placed = sorted(names, key=[*module_names(self.depth), *tower_names(tower)].index)
            self.run.save_json(f"{folder}/placement.json", placed, Artifact("placement", f"{label}: modules with LoRA"))
            options, checkpoints = dataclasses.replace(self.training, seed=seed), self.run.path(f"{folder}/training")
            examples = self.trained[family]
            if set(names) & set(tower_names(tower)):
                lora = train_tower_lora(self.model, self.processor, examples, names, options, label, checkpoints)
            else:
                ids = [example.id for example in examples]
                lora = train_lora(self.model, names, self._embedded(family), options, label, checkpoints, ids)
            self.run.add(f"{folder}/training/metrics.jsonl", training_log(f"LoRA, {label}, seed {seed}"))
            self.run.timed(f"train {folder}", begun)
            return lora

        lora = self.run.once(
            f"{folder}/adapter",
            make,
            Artifact("adapter", f"LoRA, {label}, seed {seed}"),
            write=lambda path, lora: save_peft(lora, self.model, path),
            read=lambda path: load_peft(self.model, path),
        )
        forget(self.run.folder / folder / "training", self.training)
        return self._evaluate(merge(self.model, lora), f"{folder}/", family)

    def _cell_folder(self, family: str, names: Sequence[str], seed: int) -> str:
        return f"{self.folder}cells/{family}/{folder_name(names, self.depth, self.model.depths['visual'])}/seed-{seed}"

    def _evaluate(self, model: Model, folder: str, family: str) -> dict:
        title = f"Held-out answers of {folder.removeprefix(f'{self.folder}cells/')}".rstrip("/")
        tested = self.tested[family]
        return evaluate(
            self.run, folder, model, self.processor, tested, self.metric, self.answering, title=title, label=family
        )

    def _traced(self, family: str) -> list[Example]:
        if family not in self.traced:
            raise UserError(f"no example of {family} is traced: give some with --trace")
        return self.traced[family]

    def _score(self, name: str, family: str) -> np.ndarray:
        examples, options = self._traced(family), self.tracing
        groups = list(batches(examples, self.processor, self.model.config, options.batch, align=PREFIX_BUCKET))
        providers = {
            "corruption": lambda: corrupter(self.model, self.processor, examples, groups, options),
            "fresh adapter": self._fresh_adapter,
            "trained adapter": lambda: self._trained_adapter(family),
        }
        score = SCORES[name]
        return score.compute(self.model, groups, *(providers[need]() for need in score.needs))

    def _fresh_adapter(self) -> LoRA:
        """An untrained LoRA on all modules."""
        options, key = self.training, jax.random.key(self.training.seed)
        names = module_names(self.depth)
        return init_lora(self.model, names, r=options.r, alpha=options.alpha, dropout=0.0, key=key)

    def _trained_adapter(self, family: str) -> LoRA:
        """The LoRA on all modules that was trained on a family. It is trained now if it is not in the run folder."""
        names, seed = module_names(self.depth), self.training.seed
        self.cell(family, names, seed)
        return load_peft(self.model, self.run.folder / self._cell_folder(family, names, seed) / "adapter")

    @functools.cached_property
    def _trunks(self) -> dict[str, Trunk]:
        return {}

    def _embedded(self, family: str) -> Trunk:
        """The training examples as they enter the first layer. They are computed once for all placements."""
        if family not in self._trunks:
            examples, gib = self.trained[family], self.training.trunk_gib
            self._trunks[family] = embedded_examples(self.model, self.processor, examples, gib=gib)
        return self._trunks[family]
