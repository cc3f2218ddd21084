"""The options that commands share, and how options are named.

**One name in every command.** An option is a field of a dataclass. Dataclasses are put together by inheritance, or as a
field ``tracing: tyro.conf.OmitArgPrefixes[TraceOptions]``; both ways its flag is the same, without a prefix. So the
flags of all dataclasses that meet in a command must differ:

* What a command is about is short: ``--batch``, ``--lr``, ``--epochs``, ``--seed`` are the trainer's, ``--metric`` is
  how answers are scored, ``--noise-scale`` and ``--corruption`` are the trace's.
* A flag that would collide carries its group's name, in *every* command, by ``tyro.conf.arg(name=...)``:
  ``--trace-batch``, ``--trace-seed``, ``--trace-metric``, ``--answer-batch``.
* ``--train`` and ``--eval`` name the tasks that are optimised and scored; elsewhere tasks are ``--task``.

The numbers that a field accepts stand beside it (:class:`vlm_jax.runs.ranges.Range`).
"""

import dataclasses
from typing import Any, Literal

import jax

from vlm_jax.checkpoints.load import load
from vlm_jax.checkpoints.sources import read_config, resolve
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import check_mesh
from vlm_jax.model import Model


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """What a command runs on (docs/pods.md)."""

    mesh: str | None = None
    """The devices as axes, such as data=2,fsdp=4,tensor=2. data and fsdp split the batch, fsdp also splits the
    parameters, tensor splits attention heads and MLPs. By default one device, or with --processes all devices along
    data."""
    processes: str | None = None
    """Run several processes as one, each started with this same command. auto: Slurm, GKE, a TPU VM or MPI tells them
    apart. HOST:PORT,COUNT,INDEX: the first process's address, the number of processes, and the number of this one."""

    def mesh_axes(self) -> str | None:
        """The axes of the mesh to set; None for one device. Call it after the processes have joined."""
        if self.mesh is None and self.processes is not None:
            return f"data={jax.device_count()}"
        return self.mesh


@dataclasses.dataclass(frozen=True)
class LoadOptions(DeviceOptions):
    """How a model is loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the parameters; by default that of the checkpoint."""
    min_pixels: int | None = None
    """Enlarge smaller images to this many pixels (models that take images of any size); by default the processor's."""
    max_pixels: int | None = None
    """Shrink larger images to this many pixels (models that take images of any size); by default the processor's."""
    attention: Literal["xla", "splash"] = "xla"
    """What computes the text's attention. splash: a TPU kernel that never stores the attention scores, for models whose
    attention is causal and nothing else; XLA takes over where an intervention or a tap needs the scores."""

    def load_model(self, source: str) -> tuple[Model, Any]:
        """A model and its processor, on the mesh in use (:func:`vlm_jax.configure`).

        Raises:
            UserError: a model that cannot be loaded, does not fit the mesh or has no tokeniser; --min-pixels or
                --max-pixels for a text-only model.
        """
        mesh = jax.sharding.get_mesh()
        mesh = None if mesh.empty else mesh
        if mesh is not None:
            check_mesh(read_config(resolve(source)), mesh)
        model, processor = load(source, dtype=self.dtype, mesh=mesh, attention=self.attention)
        if processor is None:
            raise UserError(f"{source} has no tokenizer_config.json: add the tokeniser's files to the folder")
        if self.min_pixels is not None or self.max_pixels is not None:
            if model.config.vision is None:
                raise UserError(f"{source} is a text-only model: drop --min-pixels and --max-pixels")
            model.config.vision.limit_pixels(processor.image_processor, self.min_pixels, self.max_pixels)
        return model, processor


@dataclasses.dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model of a command."""

    model: str = "mini-qwen3-vl"
    """Embedded model, Hugging Face folder, converted folder or hub id."""

    def load(self) -> tuple[Model, Any]:
        """:meth:`load_model` of ``--model``."""
        return self.load_model(self.model)
