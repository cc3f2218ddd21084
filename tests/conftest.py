"""Settings shared by every test: no network, and float32 products that really are float32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
