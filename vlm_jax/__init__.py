"""vlm-jax: vision-language models in JAX whose interventions are pure functions."""

from vlm_jax.checkpoints.load import load
from vlm_jax.checkpoints.save import save
from vlm_jax.checkpoints.sources import embedded_models
from vlm_jax.config import Config
from vlm_jax.configure import configure
from vlm_jax.errors import UserError
from vlm_jax.generate import generate
from vlm_jax.inputs import Inputs
from vlm_jax.model import Model, Output
from vlm_jax.sites import SITES, Context, Intervention, Tap

__all__ = [
    "SITES",
    "Config",
    "Context",
    "Inputs",
    "Intervention",
    "Model",
    "Output",
    "Tap",
    "UserError",
    "configure",
    "embedded_models",
    "generate",
    "load",
    "save",
]
