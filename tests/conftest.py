"""Settings shared by every test: no network, float32 products that really are float32, no fighting over cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import torch

torch.set_num_threads(1)  # the oracles are tiny, and more threads only wait for each other and for JAX's
jax.config.update("jax_default_matmul_precision", "highest")
