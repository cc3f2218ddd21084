"""Runs P4's study: every condition is trained with every seed and scored on the same held-out examples."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from eval.evaluation import evaluate
from interventions.editing.editors import editor_parameters
from interventions.placement.adapters import init_lora_on
from train import tune
from train.editors import edited_tokens, train_editors
from train.kept import trained_interventions, tuned_model
from train.objective import scaled_rate
from train.study.editing.options import Args
from train.study.editing.recipes import Condition
from train.study.folders import folder_of
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.runs.folder import Run
from vlm_jax.sites import TEXT_LINEARS, VISUAL_LINEARS

#: P0's learning rate of LoRA, for a model of width 2560, and its rank and alpha.
_LORA_LR, _RANK, _ALPHA = 2e-4, 64, 16.0
#: Linears of the decoder that get LoRA if there is little room (Hu et al. 2022).
_FEW = ("text.self_attn.q_proj", "text.self_attn.v_proj")


class Cell(NamedTuple):
    """The result of one training."""

    parameters: int
    """Number of trained parameters."""
    scores: np.ndarray
    """Of every held-out example."""
    step_seconds: float | None
    """Time of a training step; None if there was no training, or if it was too short to tell."""
    step_gib: float | None
    """Memory of a training step on one device, as its compiled program states it; None without a training."""


class Study(NamedTuple):
    """What all cells share."""

    args: Args
    run: Run
    model: Model
    processor: Processor
    trained: list[Example]
    tested: list[Example]

    def cell(self, condition: Condition, seed: int) -> Cell:
        """The held-out scores of a condition that was trained with this seed."""
        folder = folder_of(condition.name)
        if condition.editors is None and condition.lora is None and not condition.decoder:
            return Cell(0, self._scored(folder, condition.name, self.model), None, None)
        folder = f"{folder}/seed-{seed}"
        if condition.decoder:
            model = self._tuned(folder, condition.name, seed)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(model.text))
            return Cell(parameters, self._scored(folder, condition.name, model), *self._step_cost(folder))
        editors, options = self._begun(condition, seed), dataclasses.replace(self.args, step_memory=True)
        if condition.lora is not None:
            options = dataclasses.replace(options, lr=self._lr(_LORA_LR))
        mark = edited_tokens(editors, condition.suffix == "published")

        def train(training: Path) -> dict[str, Any]:
            on = self.model, self.processor, editors, self.trained
            return train_editors(*on, options, seed=seed, name=condition.name, folder=training, mark=mark)

        file = f"{folder}/interventions.safetensors"
        trained = trained_interventions(self.run, file, condition.name, self.model, train, self.args)
        scores = self._scored(folder, condition.name, self.model, trained)
        return Cell(sum(editor_parameters(editors).values()), scores, *self._step_cost(folder))

    def _lr(self, rate: float) -> float:
        width = self.model.config.text.hidden_size
        return self.args.lr if self.args.lr is not None else scaled_rate(rate, width)

    def _begun(self, condition: Condition, seed: int) -> dict[str, Any]:
        """The untrained interventions of a condition."""
        key = jax.random.key(seed)
        if condition.editors is not None:
            return condition.editors.init(self.model, key)
        text = [f"text.{name}" for names in TEXT_LINEARS.values() for name in names]
        match condition.lora:
            case "decoder":
                sites, rank = text, _RANK
            case "decoder and tower":
                linears = {f"visual.{name}" for names in VISUAL_LINEARS.values() for name in names}
                assert self.model.visual is not None, "P4's study is of vision-language models"
                sites, rank = [*text, *sorted(linears & self.model.visual.SITES)], _RANK
            case _:  # as large as MRT
                sites, rank = list(_FEW), self._rank_as_large_as_mrt()
        return {"lora": init_lora_on(self.model, sites, r=rank, alpha=_ALPHA, key=key)}

    def _rank_as_large_as_mrt(self) -> int:
        """The rank at which LoRA on :data:`_FEW` linears is nearest in size to MRT's editors."""
        full = self.args.chosen()[0].editors
        assert full is not None
        wanted = sum(editor_parameters(full.init(self.model, jax.random.key(0))).values())
        one = sum(
            editor_parameters(
                {"lora": init_lora_on(self.model, _FEW, r=1, alpha=_ALPHA, key=jax.random.key(0))}
            ).values()
        )
        return max(1, round(wanted / one))

    def _tuned(self, folder: str, title: str, seed: int) -> Model:
        """The model whose whole decoder was tuned."""
        options = tune.Args(
            epochs=self.args.epochs,
            batch=self.args.batch * self.args.accumulation,
            lr=self._lr(_LORA_LR / 10),
            seed=seed,
            save_every=self.args.save_every,
            step_memory=True,
        )

        def train(training: Path) -> Model:
            return tune.tune(self.model, self.processor, self.trained, options, training)

        return tuned_model(self.run, f"{folder}/model", title, self.processor, train, options, self.args)

    def _scored(self, folder: str, title: str, model: Model, acting: tuple = ()) -> np.ndarray:
        scored = evaluate(
            self.run,
            f"{folder}/",
            model,
            self.processor,
            self.tested,
            self.args,
            self.args.answering,
            interventions=acting,
            title=title,
            label=title,
        )
        return np.array(scored["scores"])

    def _step_cost(self, folder: str) -> tuple[float | None, float | None]:
        """Seconds and GiB of a step. The seconds are the median over the lines of the training's log, each a mean over
        some steps."""
        lines = (self.run.folder / folder / "training/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        seconds = [record["step_seconds"] for record in records if record["step_seconds"]]
        gib = max((record["step_memory_gib"] for record in records if "step_memory_gib" in record), default=None)
        return float(np.median(seconds)) if seconds else None, gib
