"""Runs P4's study of controllability: for each class and condition, editors that turn the answer to one question."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import vlm_jax
from interventions.editing.editors import init_editors
from train import tune
from train.editors import Mark, train_editors
from train.kept import trained_interventions, tuned_model
from train.study.artifacts import CONTROL_ANSWERS
from train.study.control.options import Args
from train.study.control.places import mark_of
from train.study.control.questions import FIXED, REWORDINGS, ask, balanced, shuffled, turned
from vlm_jax import Model
from vlm_jax.data import Example, load_task
from vlm_jax.data.scenes import pick
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import fetch, progress

#: Task -> the classes whose answer is turned (the paper has five), and all classes.
CLASSES = {
    "easy-vqa": (("circle", "rectangle", "triangle"),) * 2,
    "digits": (tuple("01234"), tuple("0123456789")),
}
#: Prompts are padded to a multiple of this, so that few programs are compiled.
_STEP = 32


class Pictures(NamedTuple):
    """The pictures of a task by split, each with the class that it shows."""

    trained: list[tuple[Example, str]]
    tested: list[tuple[Example, str]]


def pictures_of(task: str) -> Pictures:
    """Every picture of a task once. Of easy-VQA's pictures only those with a question about the shape tell it."""

    def of(split: str) -> list[tuple[Example, str]]:
        found = {}
        for example in load_task(task, split=split, limit=None):
            if example.answers[0] in CLASSES[task][1]:
                found.setdefault(example.image_id or example.id, (example, example.answers[0]))
        return list(found.values())

    return Pictures(of("train"), of("test"))


def begun(model: Model, rank: int, key: jax.Array) -> dict[str, Any]:
    """The untrained editors, in all layers of the decoder. They name no tokens, because the condition does."""
    (editor,) = init_editors(model, editors=("steering",), rank=rank, key=key).values()
    return {"steering": editor.replace(group=None)}


class Control(NamedTuple):
    """What all trainings of one task share."""

    args: Args
    run: Run
    task: str
    pictures: Pictures
    model: Model
    processor: Processor

    def base(self) -> "Control":
        """The same with a model that was tuned to answer all wordings of the question, for all classes."""
        rng, wordings = np.random.default_rng(self.args.seed), (FIXED, *REWORDINGS)
        classes, examples = CLASSES[self.task][1], []
        showing = {name: [pair for pair in self.pictures.trained if pair[1] == name] for name in classes}
        for number in range(self.args.base_examples):
            name = classes[number % len(classes)]
            # The picture shows the class in half of the questions.
            other = classes[(number + rng.integers(1, len(classes))) % len(classes)]
            picture, shown = pick(rng, showing[name if rng.random() < 0.5 else other])
            asked = ask(picture, name, shown, pick(rng, wordings))
            examples.append(dataclasses.replace(asked, id=f"{number}/{asked.id}"))
        options = tune.Args(
            parts=("text", "visual"), epochs=self.args.base_epochs, batch=32, lr=self.args.base_lr, seed=self.args.seed
        )
        title = f"{self.args.model} after questions about {self.task}"

        def train(training: Path) -> Model:
            return tune.tune(self.model, self.processor, examples, options, training)

        folder = f"{self.task}/base/model"
        return self._replace(model=tuned_model(self.run, folder, title, self.processor, train, options, self.args))

    def editors(self, name: str, condition: str) -> tuple[Any, ...]:
        """Editors that were trained to turn the answer to the fixed question about a class."""
        rng = np.random.default_rng([self.args.seed, CLASSES[self.task][1].index(name)])
        chosen = balanced(self.pictures.trained, name, self.args.limit, rng)
        examples = [turned(ask(picture, name, shown)) for picture, shown in chosen]
        if condition == "shuffled labels":
            examples = shuffled(examples, self.args.seed)
        untrained = begun(self.model, self.args.rank, jax.random.key(self.args.seed))
        folder = f"{self.task}/{condition.replace(' ', '-')}/{name}"

        title = f"{self.task} {name}, {condition}"

        def train(training: Path) -> dict[str, Any]:
            how = {"seed": self.args.seed, "name": title, "folder": training, "mark": mark_of(condition)}
            return train_editors(self.model, self.processor, untrained, examples, self.args, **how)

        file = f"{folder}/interventions.safetensors"
        return trained_interventions(self.run, file, title, self.model, train, self.args)

    def questions(self, name: str) -> dict[str, list[Example]]:
        """What is asked about a class on held-out pictures, each with the true answer: the fixed question, its
        rewordings, the fixed question about another class, and the task's own question."""
        rng = np.random.default_rng([self.args.seed, 1])
        chosen = balanced(self.pictures.tested, name, self.args.eval_limit, rng)
        classes = [other for other in CLASSES[self.task][1] if other != name]
        # Half of the pictures of another class are asked about what they show, so that yes and no are both right.
        others = [
            (picture, shown, shown if shown != name and i % 2 else classes[i % len(classes)])
            for i, (picture, shown) in enumerate(chosen)
        ]
        return {
            "fixed": [ask(picture, name, shown) for picture, shown in chosen],
            **{
                f"rewording {number}": [ask(picture, name, shown, wording) for picture, shown in chosen]
                for number, wording in enumerate(REWORDINGS, 1)
            },
            "another class": [ask(picture, other, shown) for picture, shown, other in others],
            "own question": [picture for picture, _ in chosen],
        }

    def answers(self, name: str, condition: str | None) -> list[dict]:
        """A record of every question about a class: what was asked, the true answer, and the answer under the editors
        of a condition; None for the unedited model."""
        asked = [(kind, example) for kind, examples in self.questions(name).items() for example in examples]
        editors = () if condition is None else self.editors(name, condition)
        mark = None if condition is None else mark_of(condition)
        title = f"{self.task} {name}, {condition or 'unedited'}"
        folder = f"{self.task}/{(condition or 'unedited').replace(' ', '-')}/{name}"

        def make() -> list[dict]:
            texts = _answered(self.model, self.processor, [example for _, example in asked], editors, mark, title)
            return [
                {
                    "kind": kind,
                    "id": example.id,
                    "picture": example.image_id or example.id.split("/")[1],
                    "question": example.question,
                    "true": example.answers[0],
                    "answer": text,
                }
                for (kind, example), text in zip(asked, texts, strict=True)
            ]

        return self.run.once(f"{folder}/answers.jsonl", make, Artifact("samples", title, CONTROL_ANSWERS))


def _answered(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    editors: tuple[Any, ...],
    mark: Mark | None,
    title: str,
) -> list[str]:
    texts: dict[int, str] = {}
    with progress(total=len(examples), desc=title, unit="sample", leave=False) as bar:
        for rows, batch in batches(examples, processor, model.config, 64, step=_STEP, with_answer=False):
            where = {} if mark is None else mark(batch)
            acting = tuple(editor.replace(where=where["steering"]) for editor in editors)
            tokens = fetch(vlm_jax.generate(model, batch.inputs, 4, acting))
            written = processor.tokenizer.batch_decode(tokens[: len(rows)], skip_special_tokens=True)
            texts |= {row: text.strip().lower() for row, text in zip(rows, written, strict=True)}
            bar.update(len(rows))
    return [texts[row] for row in range(len(examples))]
