"""Settings shared by every test: no network, float32 products that really are float32, no fighting over cores."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the time goes into compiling, and LLVM's optimisations are a quarter of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here to compile, not to look for a TPU

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    # Commands keep compiled programs in the user's home. Tests share them within one run and begin without any, unless
    # they are given a folder, as continuous integration does for its two runs.
    if "TEST_COMPILATION_CACHE" in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TEST_COMPILATION_CACHE"]
    else:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vlm-jax-compiled-")
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # JAX keeps only programs that take a second to compile. Most of the tests' programs take less, but there are many,
    # and they are needed again: in the other worker, in commands that tests start, and after forget_programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook

#: Where shapes in signatures are checked: in functions that are called while programs are traced. The hook wraps every
#: function of a module, which would cost modules that are called often from Python up to half of their time.
#: `make test-slow` checks all packages.
_CHECKED = (
    *(f"vlm_jax.{name}" for name in ("nn", "vision", "model", "inputs", "generate")),
    *(f"interventions.{name}" for name in ("engine", "kinds", "trace", "flow", "lens", "talo", "placement")),
    *(f"train.{name}" for name in ("objective", "step", "trunk", "edit")),
)
_EVERYWHERE = ("vlm_jax", "interventions", "eval", "train")
# Before any import of them.
install_import_hook(list(_EVERYWHERE if "CHECK_ALL_SHAPES" in os.environ else _CHECKED), "typecheck.checked")

import jax
import pytest
import torch

torch.set_num_threads(1)  # the oracles are tiny, and more threads only wait for each other and for JAX's
jax.config.update("jax_default_matmul_precision", "highest")


#: The slowest files begin first, because the other worker would wait for one that begins last. test_processes and
#: test_killed start several processes of their own; the files between them keep them from running at the same time.
_FIRST = ("test_processes", "test_diffing", "test_docs", "test_sharding", "test_killed", "test_families", "test_sweep")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees compiled programs. On CPU each holds memory and memory maps, of which Linux allows a process 65,530; the
    whole suite needs more, and XLA crashes beyond them. No file makes more than 27,000."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_programs():
    """For files whose programs run on a few tokens: compiling them takes most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
