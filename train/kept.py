"""Trainings whose results are kept in the run folder and are not repeated."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from interventions.store import load_interventions, save_interventions
from train.artifacts import training_log
from train.loop import LoopOptions, forget
from vlm_jax import Model, save
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import LoadOptions
from vlm_jax.runs.processes import fetch, is_first
from vlm_jax.sites import Intervention


def trained_interventions(
    run: Run,
    file: str,
    title: str,
    model: Model,
    train: Callable[[Path], dict[str, Any]],
    options: LoopOptions,
) -> tuple[Intervention, ...]:
    """The interventions that ``train`` returns by name, in the order of their names.

    Args:
        file: their file in the run folder. The training's log and checkpoints are beside it, in ``training``.
        model: the model with which they are trained; their file names it.
        train: gets the folder for the log and the checkpoints.
    """

    def make() -> tuple[Intervention, ...]:
        trained = _logged(run, file, title, train)
        return tuple(fetch(trained)[name] for name in sorted(trained))

    own = fingerprint(model)  # by all processes together; the first one writes alone
    loaded = run.once(
        file,
        make,
        Artifact("intervention", title),
        write=lambda path, made: save_interventions(path, made, model=own),
        read=load_interventions,
    )
    forget(run.folder / _beside(file), options)
    return loaded


def tuned_model(
    run: Run,
    folder: str,
    title: str,
    processor: Processor,
    train: Callable[[Path], Model],
    options: LoopOptions,
    loading: LoadOptions,
) -> Model:
    """The model that ``train`` returns.

    Args:
        folder: its folder in the run folder. The training's log and checkpoints are beside it, in ``training``.
        train: gets the folder for the log and the checkpoints.
        loading: how the model is loaded again.
    """

    def make() -> Model:
        tuned = _logged(run, folder, title, train)
        return fetch(tuned, keep=is_first()) if jax.process_count() > 1 else tuned

    tuned = run.once(
        folder,
        make,
        Artifact("model", title),
        write=lambda path, tuned: (save(tuned, path), processor.save_pretrained(path)),
        read=lambda path: loading.load_model(str(path))[0],
    )
    forget(run.folder / _beside(folder), options)
    return tuned


def _beside(result: str) -> str:
    """The folder of the training of a result."""
    return str(Path(result).with_name("training"))


def _logged(run: Run, result: str, title: str, train: Callable[[Path], Any]) -> Any:
    """What ``train`` returns; its log is listed, and its time is noted."""
    begun, folder = time.perf_counter(), _beside(result)
    trained = train(run.path(f"{folder}/_").parent)
    run.add(f"{folder}/metrics.jsonl", training_log(title))
    run.timed(f"train {Path(result).parent}".removesuffix(" ."), begun)
    return trained
