"""Stages that P4's studies share: trainings whose results are kept in the run folder and are not repeated."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from interventions.store import load_interventions, save_interventions
from train import tune
from train.artifacts import training_log
from train.loop import LoopOptions, forget
from vlm_jax import Model, save
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import LoadOptions
from vlm_jax.runs.processes import fetch, is_first
from vlm_jax.sites import Intervention


def trained_interventions(
    run: Run, folder: str, title: str, model: Model, train: Callable[[Path], dict[str, Any]], options: LoopOptions
) -> tuple[Intervention, ...]:
    """The interventions that ``train`` returns by name, in the order of their names.

    Args:
        folder: the folder of the training inside the run folder.
        model: the model with which they are trained; their file names it.
        train: gets the folder for the training's log and checkpoints.
    """

    def make() -> tuple[Intervention, ...]:
        trained = _logged(run, folder, title, train)
        return tuple(fetch(trained)[name] for name in sorted(trained))

    loaded = run.once(
        f"{folder}/interventions.safetensors",
        make,
        Artifact("intervention", f"{title}: what was trained"),
        write=lambda path, made: save_interventions(path, made, model=fingerprint(model)),
        read=load_interventions,
    )
    forget(run.folder / folder / "training", options)
    return loaded


def tuned_model(
    run: Run,
    folder: str,
    title: str,
    model: Model,
    processor: Processor,
    examples: list[Example],
    options: tune.Args,
    loading: LoadOptions,
) -> Model:
    """The model after whole parts of it were tuned on the examples, as :mod:`train.tune` does it."""

    def make() -> Model:
        tuned = _logged(run, folder, title, lambda training: tune.tune(model, processor, examples, options, training))
        return fetch(tuned, keep=is_first()) if jax.process_count() > 1 else tuned

    tuned = run.once(
        f"{folder}/model",
        make,
        Artifact("model", title),
        write=lambda path, tuned: (save(tuned, path), processor.save_pretrained(path)),
        read=lambda path: loading.load_model(str(path))[0],
    )
    forget(run.folder / folder / "training", options)
    return tuned


def _logged(run: Run, folder: str, title: str, train: Callable[[Path], Any]) -> Any:
    """What ``train`` returns; its log is listed, and its time is noted."""
    begun = time.perf_counter()
    trained = train(run.path(f"{folder}/training/_").parent)
    run.add(f"{folder}/training/metrics.jsonl", training_log(title))
    run.timed(f"train {folder}", begun)
    return trained
