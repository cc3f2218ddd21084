"""What a training says of itself: a line a few steps in ``metrics.jsonl``, and the same to TensorBoard or W&B."""

import contextlib
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import monitoring

from vlm_jax.errors import UserError
from vlm_jax.mesh.chips import chip
from vlm_jax.runs.processes import is_first

try:
    import resource
except ImportError:  # Windows
    resource = None

Tracker = Literal["tensorboard", "wandb"]
#: Tracker -> the package that it needs.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class About(NamedTuple):
    """What a loop cannot know of its steps: the learning rate of a step and the ids of its examples; tokens of a step,
    padding included, and FLOPs of its matmuls. What is None is not in the log."""

    rate: Callable[[int], Any] | None = None
    ids: Callable[[int], Sequence[str]] | None = None
    tokens: int | None = None
    flops: float | None = None


class _Compiling:
    """Seconds that this process has spent on tracing and compiling."""

    def __init__(self):
        self.seconds = 0.0
        monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


_compiling = _Compiling()


class Meter:
    """Writes a record per call of :meth:`log`: ``step, loss, grad_norm, lr, tokens_per_second, step_seconds`` (the mean
    since the last record, compiling left out), ``compile_seconds`` since then, ``mfu`` (FLOPs of the steps over what
    the devices could do in bfloat16; frozen kernels count 4 a parameter and token, as they get no gradient; None on a
    CPU), ``peak_memory_gib`` (of the first device, or on a CPU of the process) and ``seconds`` since the session began.
    """

    def __init__(self, folder: Path, about: About, after: int, trackers: Sequence[Tracker] = (), label: str = ""):
        """After so many steps: what a stopped session wrote of later ones is taken out."""
        self.file, self.about, self.last = folder / "metrics.jsonl", about, after
        self.begun = self.then = time.perf_counter()
        self.compiled = _compiling.seconds
        self.sinks: list[Callable[[dict], None]] = []
        self.stack = contextlib.ExitStack()
        if is_first():
            _forget_after(self.file, after)
            self.sinks = [self._append, *(_SINKS[name](folder, label, self.stack) for name in trackers)]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Of the step that was the ``step``-th: its ``loss`` and ``grad_norm``."""
        now, compiled = time.perf_counter(), _compiling.seconds
        compiling, steps = compiled - self.compiled, max(1, step - self.last)
        each = max((now - self.then - compiling) / steps, 1e-9)
        about, kind = self.about, chip(jax.devices()[0].device_kind)
        record = {"step": step, **metrics}
        if about.rate is not None:
            record["lr"] = float(about.rate(step - 1))
        if about.tokens is not None:
            record["tokens_per_second"] = round(about.tokens / each, 1)
        record |= {"step_seconds": round(each, 4), "compile_seconds": round(compiling, 2)}
        if about.flops is not None:
            full = None if kind is None else kind.flops * jax.device_count()
            record["mfu"] = None if full is None else round(about.flops / each / full, 4)
        record |= {"peak_memory_gib": round(_peak() / 2**30, 3), "seconds": round(now - self.begun, 2)}
        self.last, self.then, self.compiled = step, now, compiled
        for sink in self.sinks:
            sink(record)

    def close(self) -> None:
        self.stack.close()

    def _append(self, record: dict) -> None:
        try:
            with open(self.file, "a") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file} ({error.strerror}): free the disk") from None


def check_trackers(names: Sequence[Tracker]) -> None:
    """Refuses those that are not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(f"--track {name} needs the package {_PACKAGES[name]}: pip install {_PACKAGES[name]}")


def _tensorboard(folder: Path, label: str, stack: contextlib.ExitStack) -> Callable[[dict], None]:
    from tensorboardX import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def sink(record: dict) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, record["step"])

    return sink


def _wandb(folder: Path, label: str, stack: contextlib.ExitStack) -> Callable[[dict], None]:
    import wandb

    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]  # the same run in every session
    run = wandb.init(project="vlm-jax", name=label, id=name, dir=str(folder), resume="allow")
    stack.callback(run.finish)
    return lambda record: run.log(record, step=record["step"])


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _peak() -> int:
    """Bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def unsound(metrics: dict[str, np.ndarray]) -> str | None:
    """The name and value of the first number that is none, in words."""
    bad = ((name.replace("_", " "), value) for name, value in metrics.items() if not np.isfinite(value))
    return next((f"the {name} is {value}" for name, value in bad), None)


def _forget_after(file: Path, step: int) -> None:
    """Takes out of a log what a stopped session wrote after its last checkpoint, or broke off while writing."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(kept))
    scratch.replace(file)
