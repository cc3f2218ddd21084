"""The settings of a whole process: matmul precision, the cache of compiled programs, the mesh."""

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from vlm_jax.mesh.sharding import make_mesh

#: Where compiled programs are kept between processes.
CACHE = Path.home() / ".cache" / "vlm-jax"


def configure(*, mesh: str | None = None, cache: str | Path | None = CACHE, matmul_precision: str = "highest") -> None:
    """Does what every command does before its work. Call it once, before a model is loaded.

    Importing the library sets none of this, so without the call JAX's own defaults hold: an accelerator then multiplies
    float32 matrices in fewer bits, and every process compiles its programs again.

    Args:
        mesh: the devices as axes, such as ``"data=2,tensor=2"``. Models that are loaded and arrays that are computed
            later are split over them. One device where None.
        cache: the folder in which compiled programs are kept for later processes; None for no such folder. The default
            does not replace a folder that JAX already has (``JAX_COMPILATION_CACHE_DIR``).
        matmul_precision: of float32 products: ``"highest"`` is float32 on every device. Products of bfloat16 are not
            affected.

    Raises:
        UserError: for a mesh that cannot be read or that needs other devices than there are.
    """
    jax.config.update("jax_default_matmul_precision", matmul_precision)
    if cache != CACHE or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", None if cache is None else str(Path(cache).expanduser()))
    if mesh is not None:
        jax.set_mesh(make_mesh(mesh))


def check_precision(dtypes: Iterable[jnp.dtype]) -> None:
    """Warns, once in a process, if parameters with these dtypes are float32, lie on an accelerator, and no matmul
    precision is set: their products would then be rounded to fewer bits, unlike those of the commands."""
    if jax.default_backend() == "cpu" or jax.config.jax_default_matmul_precision is not None:
        return
    if jnp.dtype("float32") in dtypes:
        _warn_of_rounding()


@functools.cache
def _warn_of_rounding() -> None:
    warnings.warn(
        "a float32 model is loaded on an accelerator that by default multiplies float32 matrices in fewer bits: call "
        "vlm_jax.configure() first for the results that the commands give",
        stacklevel=4,
    )
