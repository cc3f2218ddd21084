"""What is global: importing the library sets nothing of it, configure sets it, and load warns where it is missing."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import vlm_jax
from vlm_jax import UserError
from vlm_jax.configure import _warn_of_rounding

ROOT = Path(__file__).parents[2]
#: Prints the globals that an import could change, before and after it, and the number of modules that were imported.
IMPORT_ALL = """
import json, pkgutil, sys, importlib
import jax, matplotlib
matplotlib.use("template")  # as a notebook that has a backend of its own

def globals_now():
    return {
        **{name: repr(value) for name, value in jax.config.values.items()},
        "backend": matplotlib.get_backend(),
        "mesh": repr(jax.sharding.get_mesh()),
        "abstract mesh": repr(jax.sharding.get_abstract_mesh()),
    }

before, names = globals_now(), []
for package in ("vlm_jax", "interventions", "eval", "train"):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        importlib.import_module(found.name)
        names.append(found.name)
CHANGE
after = globals_now()
print(json.dumps([len(names), {name: [before[name], after[name]] for name in before if before[name] != after[name]}]))
"""
#: Prints the settings after configure, in a process of its own.
CONFIGURE = """
import json, jax, vlm_jax
vlm_jax.configure(ARGUMENTS)
x = jax.jit(lambda a: a @ a).lower(jax.numpy.ones((2, 2))).as_text()
mesh = jax.sharding.get_mesh()
print(json.dumps([
    jax.config.jax_default_matmul_precision, jax.config.jax_compilation_cache_dir, dict(mesh.shape), "HIGHEST" in x
]))
"""


def run(code: str, **environment: str):
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/someone", "TPU_SKIP_MDS_QUERY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_everything_changes_no_global():
    count, changed = run(IMPORT_ALL.replace("CHANGE", ""))
    assert count > 80 and changed == {}


def test_the_test_above_sees_a_change():
    _, changed = run(IMPORT_ALL.replace("CHANGE", "vlm_jax = sys.modules['vlm_jax']; vlm_jax.configure(mesh='data=1')"))
    assert {"jax_default_matmul_precision", "jax_compilation_cache_dir", "mesh"} <= changed.keys()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ("", {}, ["highest", "/home/someone/.cache/vlm-jax", {}, True]),
        ("", {"JAX_COMPILATION_CACHE_DIR": "/kept"}, ["highest", "/kept", {}, True]),
        ("cache=None", {"JAX_COMPILATION_CACHE_DIR": "/kept"}, ["highest", None, {}, True]),
        (
            "cache='~/mine', matmul_precision='default', mesh='data=2,tensor=2'",
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            ["default", "/home/someone/mine", {"data": 2, "fsdp": 1, "tensor": 2}, False],
        ),
    ],
    ids=["defaults", "the cache that JAX has", "no cache", "all given"],
)
def test_what_is_set(arguments, environment, expected):
    assert run(CONFIGURE.replace("ARGUMENTS", arguments), **environment) == expected


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="mesh"):
        vlm_jax.configure(mesh="data=4096")
    assert jax.sharding.get_mesh().empty


@pytest.fixture
def warned(monkeypatch):
    """The warnings of a model's loading, on a backend that is called ``backend``, with a matmul precision."""

    def load(backend: str, precision: str | None, dtype: str, times: int = 1) -> list[str]:
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        _warn_of_rounding.cache_clear()
        jax.config.update("jax_default_matmul_precision", precision)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                vlm_jax.load("mini-llava", dtype=dtype)
        return [str(warning.message) for warning in caught if "vlm_jax.configure" in str(warning.message)]

    before = jax.config.jax_default_matmul_precision
    yield load
    jax.config.update("jax_default_matmul_precision", before)


def test_float32_on_an_accelerator_without_a_precision_is_warned_of_once(warned):
    assert len(warned("gpu", None, "float32", times=2)) == 1


@pytest.mark.parametrize(
    ("backend", "precision", "dtype"),
    [("cpu", None, "float32"), ("gpu", "highest", "float32"), ("tpu", "default", "float32"), ("gpu", None, "bfloat16")],
)
def test_nothing_is_warned_of_elsewhere(warned, backend, precision, dtype):
    assert jnp.dtype(dtype) and warned(backend, precision, dtype) == []
