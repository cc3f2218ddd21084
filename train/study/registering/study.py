"""Runs P1's study of Registering: every condition is trained with every seed and asked the same questions."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import vlm_jax
from interventions.flow.knockout import form, judged
from interventions.kinds.attention import AttentionKnockout
from interventions.kinds.groups import bind
from train.artifacts import training_log
from train.loop import LoopOptions, forget
from train.mixture import MixtureOptions
from train.objective import scaled_rate
from train.registering import RegisterOptions, train_registers
from train.study.artifacts import REGISTERING_ANSWERS
from train.study.folders import folder_of
from train.study.registering.options import Args
from train.study.registering.pictures import most_attended, pooled
from train.study.registering.recipes import Condition, Data
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import fetch, progress

#: The default peak learning rate for a model of width 2560.
_LR = 5e-5
#: Prompts are padded to a multiple of this, so that few programs are compiled.
_STEP = 64


class Cell(NamedTuple):
    """The answers of one training, with an entry for each held-out example.

    failed: whether the output is no possible answer (:func:`interventions.flow.knockout.judged`). cut: whether it is
    right if text cannot read the registers; None without registers.
    """

    right: np.ndarray
    failed: np.ndarray
    cut: np.ndarray | None


class Study(NamedTuple):
    """What all cells share."""

    args: Args
    run: Run
    model: Model
    processor: Processor
    trained: dict[Data, list[Example]]
    tested: list[Example]

    def cell(self, condition: Condition, seed: int) -> Cell:
        """The answers of a condition that was trained with this seed."""
        folder = folder_of(condition.name) if condition.data is None else f"{folder_of(condition.name)}/seed-{seed}"
        options = study_options(self.args, condition, seed, self.model)

        def make() -> list[dict]:
            model = self.model
            if condition.registers is not None:
                model = model.with_registers(options.registers_of(model, self.processor))
            if condition.data is not None:
                training = self.run.path(f"{folder}/training/_").parent
                model = train_registers(model, self.processor, self.trained[condition.data], options, training)
                self.run.add(f"{folder}/training/metrics.jsonl", training_log(condition.name))
            records = self.answered(model, condition.name, lambda batch: self.prepared(model, condition, batch))
            if condition.registers is not None:
                cut = AttentionKnockout.between(model.depths["text"], "text", "register", mode="pre_softmax")
                without = self.answered(
                    model, f"{condition.name}, cut", lambda batch: (batch.inputs, bind([cut], batch))
                )
                for record, other in zip(records, without, strict=True):
                    record["cut"] = {name: other[name] for name in ("output", "correct", "failure")}
            return records

        title = f"{condition.name}: answers"
        records = self.run.once(f"{folder}/answers.json", make, Artifact("samples", title, REGISTERING_ANSWERS))
        if condition.data is not None:
            forget(self.run.folder / folder / "training", self.args)
        cut = [record["cut"]["correct"] for record in records] if condition.registers is not None else None
        return Cell(
            np.array([float(record["correct"]) for record in records]),
            np.array([float(record["failure"] is not None) for record in records]),
            None if cut is None else np.array(cut, float),
        )

    def prepared(self, model: Model, condition: Condition, batch: Batch) -> tuple[Any, tuple[Any, ...]]:
        """The inputs and interventions with which a condition answers."""
        match condition.reduced:
            case "pooled":
                return pooled(model, batch, condition.count)
            case "most attended":
                return most_attended(model, batch, condition.count, self.args.layer)
        return batch.inputs, ()

    def answered(self, model: Model, title: str, prepare: Callable[[Batch], tuple[Any, Sequence[Any]]]) -> list[dict]:
        """A record for each held-out example: what the model answers, and whether this is right."""
        args, tokenizer = self.args, self.processor.tokenizer
        forms: dict[str, set[str]] = {}
        for example in self.tested:
            forms.setdefault(example.task, set()).add(form(example.answers[0]))
        options = {"with_answer": False, "step": _STEP}
        records: dict[int, dict] = {}
        with progress(total=len(self.tested), desc=title, unit="sample", leave=False) as bar:
            for rows, batch in batches(self.tested, self.processor, model.config, args.answer_batch, **options):
                inputs, acting = prepare(batch)
                tokens = fetch(vlm_jax.generate(model, inputs, args.max_new_tokens, acting))
                for row, written in zip(rows, tokens, strict=False):
                    example = self.tested[row]
                    known = judged(example, written, tokenizer, model.config.eos_token_ids, forms[example.task])
                    records[row] = {"id": example.id, "task": example.task, **known}
                bar.update(len(rows))
        return [records[row] for row in range(len(self.tested))]


def study_options(args: Args, condition: Condition, seed: int, model: Model) -> RegisterOptions:
    """The options of train.register for a condition."""
    return RegisterOptions(
        registers=condition.registers or 1,
        mask=condition.mask,
        epochs=args.epochs,
        batch=args.batch,
        lr=scaled_rate(_LR, model.config.text.hidden_size) if args.lr is None else args.lr,
        seed=seed,
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(LoopOptions)},
    )


def training_sets(args: Args) -> dict[Data, list[Example]]:
    """Captions, questions, and half of each, with equally many examples.

    Raises:
        UserError: see :meth:`train.mixture.MixtureOptions.mixture`.
    """

    def mixed(tasks: Sequence[str], limit: int) -> list[Example]:
        mixture = MixtureOptions(train=tuple(tasks), limit=limit).mixture(args)
        return list(itertools.chain(*mixture.values()))

    half = args.limit // 2
    return {
        "captions": mixed([args.captions], args.limit),
        "questions": mixed(args.questions, args.limit),
        "both": [*mixed([args.captions], half), *mixed(args.questions, args.limit - half)],
    }
