"""The log of a training: one line every few steps in ``metrics.jsonl`` and, if asked for, in TensorBoard or W&B."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
    """Facts about the steps of a training that the loop does not know. The log leaves out what is None.

    rate: a function step -> learning rate, or label -> such a function. ids: step -> the ids of its examples. tokens:
    number of tokens in a step, padding included. flops: FLOPs of the matmuls in a step.
    """

    rate: Callable[[int], Any] | Mapping[str, Callable[[int], Any]] | None = None
    ids: Callable[[int], Sequence[str]] | None = None
    tokens: int | None = None
    flops: float | None = None


class _Compiling:
    """Counts the seconds that this process spends on tracing and compiling."""

    def __init__(self):
        self.seconds = 0.0
        monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


_compiling = _Compiling()


class Meter:
    """Writes a record for each call of :meth:`log`. Use it as ``with Meter(...) as meter``.

    The fields of a record:

    * ``step``, ``loss``, ``grad_norm``, and further metrics that the loss returns. With members, ``loss`` and
      ``grad_norm`` are means over the members that are still trained, ``alive`` is their number, and ``losses`` has one
      loss for each member.
    * ``lr``: the learning rate; or ``lr_LABEL`` for each label if their rates differ.
    * ``tokens_per_second``, and ``step_seconds``: the mean time of a step. Both are measured since the last record,
      without the time for compiling, which is ``compile_seconds``.
    * ``mfu``: the FLOPs of the steps as a share of the devices' bfloat16 peak; None on a CPU. A frozen kernel counts
      4 FLOPs for each parameter and token instead of 6, because it gets no gradient.
    * ``peak_memory_gib``: of the first device, or of the process on a CPU.
    * ``step_memory_gib``: of a step on one device, if :attr:`step_bytes` is set.
    * ``seconds`` since the session began.

    Numbers that are not finite are written as null.
    """

    def __init__(self, folder: Path, about: About, after: int, trackers: Sequence[Tracker] = (), label: str = ""):
        """``after``: the number of steps that are done. Records of later steps are removed: a session that was stopped
        wrote them after its last checkpoint."""
        self.file, self.about, self.last = folder / "metrics.jsonl", about, after
        self.begun = self.then = time.perf_counter()
        self.compiled = _compiling.seconds
        self.step_bytes: int | None = None
        self.sinks: list[Callable[[dict], None]] = []
        self.stack = contextlib.ExitStack()
        if is_first():
            _forget_after(self.file, after)
            self.sinks = [self._append, *(_SINKS[name](folder, label, self.stack) for name in trackers)]

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def log(self, step: int, metrics: dict) -> None:
        """Writes the record of the ``step``-th step with these metrics: numbers, or lists with one for each member."""
        now, compiled = time.perf_counter(), _compiling.seconds
        compiling, steps = compiled - self.compiled, max(1, step - self.last)
        each = max((now - self.then - compiling) / steps, 1e-9)
        about, kind = self.about, chip(jax.devices()[0].device_kind)
        record = {"step": step, **{name: _finite(value) for name, value in metrics.items()}}
        record |= {name: float(rate(step - 1)) for name, rate in _rates(about.rate).items()}
        if about.tokens is not None:
            record["tokens_per_second"] = round(about.tokens / each, 1)
        record |= {"step_seconds": round(each, 4), "compile_seconds": round(compiling, 2)}
        if about.flops is not None:
            full = None if kind is None else kind.flops_per_second * jax.device_count()
            record["mfu"] = None if full is None else round(about.flops / each / full, 4)
        if self.step_bytes is not None:
            record["step_memory_gib"] = round(self.step_bytes / 2**30, 4)
        record |= {"peak_memory_gib": round(_peak() / 2**30, 3), "seconds": round(now - self.begun, 2)}
        self.last, self.then, self.compiled = step, now, compiled
        for sink in self.sinks:
            sink(record)

    def _append(self, record: dict) -> None:
        try:
            with open(self.file, "a") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file} ({error.strerror}): free the disk") from None


def _rates(rate: Callable | Mapping[str, Callable] | None) -> dict[str, Callable]:
    """Name in the log -> learning rate of a step."""
    if rate is None:
        return {}
    if not isinstance(rate, Mapping):
        return {"lr": rate}
    if len(set(rate.values())) == 1:
        return {"lr": next(iter(rate.values()))}
    return {f"lr_{label}": one for label, one in rate.items()}


def _finite(value: Any) -> Any:
    """The number, or None if it is not finite, because JSON cannot hold such numbers. A list is converted one by
    one."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if np.isfinite(value) else None


def _scalars(record: dict) -> dict:
    """The record with one number for each name, which trackers need: ``losses/3`` is the fourth number of a list."""
    flat = {}
    for name, value in record.items():
        flat |= {f"{name}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises a UserError if the package of one of these trackers is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(f"--track {name} needs the package {_PACKAGES[name]}: pip install {_PACKAGES[name]}")


def _tensorboard(folder: Path, label: str, stack: contextlib.ExitStack) -> Callable[[dict], None]:
    from tensorboardX import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def sink(record: dict) -> None:
        for name, value in _scalars(record).items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, record["step"])

    return sink


def _wandb(folder: Path, label: str, stack: contextlib.ExitStack) -> Callable[[dict], None]:
    wandb = importlib.import_module("wandb")
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]  # the same run in every session
    run = wandb.init(project="vlm-jax", name=label, id=name, dir=str(folder), resume="allow")
    stack.callback(run.finish)
    return lambda record: run.log(_scalars(record), step=record["step"])


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _peak() -> int:
    """The largest memory use so far, in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss counts the parent process's memory too
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return 1024 * int(found[1])
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_after(file: Path, step: int) -> None:
    """Removes the records of steps after ``step`` from a log, and an incomplete last line. A stopped session wrote
    them."""
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
