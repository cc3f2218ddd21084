"""Which model a command runs and how it is loaded: the options that every command shares."""

import dataclasses
from typing import Literal

from vlm_jax.checkpoint import load
from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model of a command."""

    model: str = "mini-qwen3-vl"
    """Embedded model, Hugging Face folder, converted folder or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the parameters; the checkpoint's own by default."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels (models that take any size); the processor's own by default."""
    max_pixels: int | None = None
    """Larger images are shrunk to this many pixels (models that take any size); the processor's own by default."""

    def load(self):
        """The model and its processor, which a command cannot do without."""
        model, processor = load(self.model, dtype=self.dtype)
        if processor is None:
            raise UserError(f"{self.model} has no tokenizer_config.json: add the tokeniser's files to the folder")
        if self.min_pixels is not None or self.max_pixels is not None:
            if model.config.vision is None:
                raise UserError(f"{self.model} is a text-only model: drop --min-pixels and --max-pixels")
            model.config.vision.limit_pixels(processor.image_processor, self.min_pixels, self.max_pixels)
        return model, processor
