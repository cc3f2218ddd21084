"""Which model a command runs, and on which devices: the options that every command shares."""

import dataclasses
from typing import Literal

import jax

from vlm_jax.checkpoints.load import load
from vlm_jax.checkpoints.sources import read_config, resolve
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import check_mesh, make_mesh


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """What a command runs on (docs/pods.md)."""

    mesh: str | None = None
    """Devices as axes, such as data=2,fsdp=4,tensor=2: data and fsdp split the batch, fsdp the parameters too, tensor
    heads and MLP. All on one device by default, and with --processes all along data."""
    processes: str | None = None
    """Several processes, each started with this command, as one: auto where Slurm, GKE, a TPU VM or MPI says who they
    are, else HOST:PORT,COUNT,INDEX of the first one's address, how many there are and which this is."""


@dataclasses.dataclass(frozen=True)
class ModelOptions(DeviceOptions):
    """The model of a command."""

    model: str = "mini-qwen3-vl"
    """Embedded model, Hugging Face folder, converted folder or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the parameters; the checkpoint's own by default."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels (models that take any size); the processor's own by default."""
    max_pixels: int | None = None
    """Larger images are shrunk to this many pixels (models that take any size); the processor's own by default."""

    attention: Literal["xla", "splash"] = "xla"
    """What computes the text's attention: XLA, or on a TPU the splash kernel, which never lays the scores out (models
    whose attention is causal and nothing else; where an intervention or a tap asks for scores, XLA does)."""

    def load(self):
        """The model and its processor, which a command cannot do without; on the mesh, which is then in use."""
        mesh, text = None, self.mesh
        if text is None and self.processes is not None:
            text = f"data={jax.device_count()}"
        if text is not None:
            mesh = make_mesh(text)
            check_mesh(read_config(resolve(self.model)), mesh)
            jax.set_mesh(mesh)
        model, processor = load(self.model, dtype=self.dtype, mesh=mesh, attention=self.attention)
        if processor is None:
            raise UserError(f"{self.model} has no tokenizer_config.json: add the tokeniser's files to the folder")
        if self.min_pixels is not None or self.max_pixels is not None:
            if model.config.vision is None:
                raise UserError(f"{self.model} is a text-only model: drop --min-pixels and --max-pixels")
            model.config.vision.limit_pixels(processor.image_processor, self.min_pixels, self.max_pixels)
        return model, processor
