"""The options that commands share, and how options are named.

**One name in every command.** An option is a field of a dataclass. A command combines dataclasses by inheritance, or
has one as a field ``tracing: tyro.conf.OmitArgPrefixes[TraceOptions]``. In both cases the flag is the same, without a
prefix. So all dataclasses of a command must have different flags:

* The flags for the main work of a command are short: ``--batch``, ``--lr``, ``--epochs`` and ``--seed`` belong to the
  trainer, ``--metric`` to the scoring of answers, ``--noise-scale`` and ``--corruption`` to the trace.
* A flag that would have the name of another one begins with the name of its group, in *every* command, by
  ``tyro.conf.arg(name=...)``: ``--trace-batch``, ``--trace-seed``, ``--trace-metric``, ``--answer-batch``.
* In commands that train, ``--train`` and ``--eval`` name the tasks to train on and to score. In all other commands the
  flag is ``--task``.

A field's annotation has the numbers that it accepts (:class:`vlm_jax.runs.ranges.Range`).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import tyro

from vlm_jax.checkpoints.load import load, load_processor
from vlm_jax.checkpoints.sources import read_config, resolve
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import check_mesh
from vlm_jax.model import Model
from vlm_jax.processor import Processor
from vlm_jax.runs.ranges import Range


@dataclasses.dataclass(frozen=True)
class PageOptions:
    """Whether a command makes a page of its results."""

    page: bool = False
    """At the end, make a page of the results in the folder --out: page.html, for a browser (docs/page.md)."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions(PageOptions):
    """The devices and processes on which a command runs (docs/pods.md)."""

    mesh: str | None = None
    """How work is divided among devices, such as data=2,fsdp=4,tensor=2 for 16 devices. data and fsdp split the batch,
    fsdp also splits the parameters, tensor splits attention heads and MLPs. By default one device is used; with
    --processes, all devices, along data."""
    processes: str | None = None
    """Run the command on several processes, each started with the same command line. auto: Slurm, GKE, a TPU VM or MPI
    numbers them. HOST:PORT,COUNT,INDEX: the address of the first process, the number of processes, and the number of
    this one, from 0."""
    figures: Annotated[tuple[Literal["svg", "pdf"], ...], tyro.conf.arg(metavar="FORMAT [FORMAT ...]")] = ()
    """Also write every figure in these formats, svg or pdf. PNG is always written. For a finished run: python -m
    interventions.figures."""

    def mesh_axes(self) -> str | None:
        """The axes of the mesh to set; None for one device. Call it after the processes have joined."""
        if self.mesh is None and self.processes is not None:
            return f"data={jax.device_count()}"
        return self.mesh


@dataclasses.dataclass(frozen=True)
class LoadOptions(DeviceOptions):
    """How a model is loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of parameters and activations. By default the same as in the checkpoint."""
    weights: Literal["bfloat16"] | None = None
    """bfloat16: matrices stay as a bfloat16 checkpoint has them, in half the memory, and everything else is float32. By
    default matrices are like everything else."""
    min_pixels: Annotated[int | None, Range(least=1)] = None
    """Images with fewer pixels are enlarged to this number, for models that take images of any size. By default the
    model's processor sets it."""
    max_pixels: Annotated[int | None, Range(least=1)] = None
    """Images with more pixels are shrunk to this number, for models that take images of any size. By default the
    model's processor sets it."""
    attention: Literal["xla", "splash"] = "xla"
    """The program that computes the text's attention. xla: the compiler's own; splash: a TPU kernel that never stores
    the attention scores, for models with plain causal attention. Even with splash, xla is used where an intervention or
    an analysis needs the scores."""

    def load_model(self, source: str) -> tuple[Model, Processor]:
        """A model and its processor, on the mesh in use (:func:`vlm_jax.configure`).

        Raises:
            UserError: if the model cannot be loaded, does not fit the mesh or has no tokeniser; if --min-pixels or
                --max-pixels is given for a text-only model.
        """
        mesh = jax.sharding.get_mesh()
        mesh = None if mesh.empty else mesh
        if mesh is not None:
            check_mesh(read_config(resolve(source)), mesh)
        model, processor = load(source, dtype=self.dtype, weights=self.weights, mesh=mesh, attention=self.attention)
        if processor is None:
            raise UserError(f"{source} has no tokenizer_config.json: add the tokeniser's files to the folder")
        self._limit_pixels(source, model.config, processor)
        return model, processor

    def _limit_pixels(self, source: str, config: Config, processor: Processor) -> None:
        if self.min_pixels is not None or self.max_pixels is not None:
            if config.vision is None:
                raise UserError(f"{source} is a text-only model: drop --min-pixels and --max-pixels")
            config.vision.limit_pixels(processor.image_processor, self.min_pixels, self.max_pixels)


@dataclasses.dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model of a command."""

    model: str = "mini-qwen3-vl"
    """The model: the name of an embedded model (mini-qwen3-vl, mini-gemma3, mini-llava), a Hugging Face folder, a
    folder that vlm_jax.convert wrote, or a hub id."""

    def load(self) -> tuple[Model, Processor]:
        """The model that ``--model`` names, and its processor; see :meth:`load_model`."""
        return self.load_model(self.model)

    def load_processor(self) -> tuple[Config, Processor]:
        """The config of the model that ``--model`` names, and its processor, without the weights."""
        folder = resolve(self.model)
        config = read_config(folder)
        processor = load_processor(folder, config)
        if processor is None:
            raise UserError(f"{self.model} has no tokenizer_config.json: add the tokeniser's files to the folder")
        self._limit_pixels(self.model, config, processor)
        return config, processor
