"""Meshes: what they may be, and that a mesh of eight devices computes what one device does."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlm_jax import Model, UserError
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.families import BACKBONES
from vlm_jax.info import config_of
from vlm_jax.mesh.sharding import (
    AXES,
    MESH_AXES,
    REPLICATED,
    RULES,
    _among,
    axes_of,
    check_mesh,
    constrain,
    make_mesh,
    mesh_sizes,
    own_rows,
    placed_rows,
    shards,
    spec_of,
)

ROOT = Path(__file__).parents[3]
SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def test_sizes():
    assert mesh_sizes("tensor=2, data=4") == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("date=2", "unknown axis 'date'; did you mean 'data'"),
        ("data=2,data=4", "names the axis data twice"),
        ("data=two", "size of data is 'two'"),
        ("data=0", "size of data is '0'"),
        ("data", "size of data is ''"),
        ("", "unknown axis ''"),
        ("data=64", "64 x 1 x 1 = 64 devices, but there are"),
    ],
)
def test_refused_meshes(text, says):
    with pytest.raises(UserError) as raised:
        make_mesh(text)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_mesh_that_cuts_heads_is_refused():
    def mesh(tensor):
        return jax.sharding.AbstractMesh((1, 1, tensor), MESH_AXES)

    with pytest.raises(
        UserError, match=r"tensor=16 does not .* 32 heads and 8 key-value heads: choose one of 1, 2, 4, 8$"
    ):
        check_mesh(config_of("Qwen3-VL-4B"), mesh(16))
    check_mesh(config_of("Qwen3-VL-4B"), mesh(8))


def test_rules_name_axes_of_the_mesh_and_each_parameter_axis_a_rule():
    assert {name for names in RULES.values() for name in names} <= set(MESH_AXES)
    assert {axis for axes in AXES.values() for axis in axes if axis} <= set(RULES)


def test_every_kernel_of_every_family_is_split_or_named_as_replicated():
    models = [config_of(name) for name in ("Qwen3-VL-2B", "Qwen2.5-VL-3B", "Gemma-3-4B", "LLaVA-1.5-7B")]
    assert {config.family for config in models} == set(BACKBONES)  # a new family needs a model here
    shapes = [jax.eval_shape(functools.partial(Model, config), jax.random.key(0)) for config in models]
    paths = {path for model in shapes for path in named_leaves(model)}
    kernels = {path for path in paths if path.endswith(".kernel")}
    split = {path for path in kernels if axes_of(path)}
    replicated = {path for path in kernels if any(path.endswith(f".{suffix}") for suffix in REPLICATED)}
    assert split | replicated == kernels and not split & replicated
    assert all(any(path.endswith(f".{suffix}") for path in paths) for suffix in (*AXES, *REPLICATED))  # none is dead
    with pytest.raises(LookupError, match=r"'visual\.resampler\.kernel': add it to AXES or REPLICATED"):
        axes_of("visual.resampler.kernel")


def test_what_is_not_divided_is_whole():
    assert spec_of((16, 3), ("batch", "mlp"), SIZES) == PartitionSpec(("data", "fsdp"), None)
    assert spec_of((2, 6), ("batch", "mlp"), SIZES) == PartitionSpec("data", "tensor")
    assert spec_of((3,), ("batch",), SIZES) == PartitionSpec(None)


def test_no_axis_is_used_twice():
    """A batch over fsdp leaves none for the width."""
    assert spec_of((16, 64), ("batch", "embed"), SIZES) == PartitionSpec(("data", "fsdp"), None)
    assert spec_of((64, 64), ("embed", "batch"), SIZES) == PartitionSpec("fsdp", "data")


def test_without_a_mesh_nothing_is_said():
    x = np.ones((4, 4))
    assert constrain(x, "batch", None) is x
    assert shards("batch", 4) == 1
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", None))(x))


def test_on_a_mesh_it_is():
    mesh = jax.sharding.AbstractMesh((2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        assert shards("batch", 4) == 2 and shards("batch", 3) == 1
        assert "sharding_constraint" in str(jax.make_jaxpr(lambda x: constrain(x, "batch", None))(np.ones((4, 4))))


def test_one_process_has_every_row():
    batch = np.arange(12).reshape(1, 6, 2)
    np.testing.assert_array_equal(own_rows(6), range(6))
    assert placed_rows(batch, 6, axis=1) is batch
    with jax.set_mesh(make_mesh("data=1", jax.devices()[:1])):
        np.testing.assert_array_equal(own_rows(6), range(6))
        np.testing.assert_array_equal(placed_rows(batch, 3, axis=1), batch)


def test_a_device_finds_its_rows_among_those_of_its_process():
    """Of eight rows with three entries each, of which the process has two pairs that are no neighbours."""
    own = np.array([0, 1, 4, 5])
    entries = np.arange(24).reshape(8, 3)[own].ravel()
    for start, stop in ((0, 6), (3, 6), (12, 18), (15, 18)):
        np.testing.assert_array_equal(entries[_among(own, 3, start, stop)], range(start, stop))


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """Traces, LoRA's loss and gradients, and generation, on meshes of all kinds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.on_a_mesh"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "NPROC": "32",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    others = {name: jobs for name, jobs in found.items() if "another run" in name}
    meshes = {name: jobs for name, jobs in found.items() if name not in others}
    assert len(meshes) == len(others) == 2
    for name, jobs in meshes.items():
        for job, gap in jobs.items():
            assert gap < (1e-5 if job != "generate" else 1e-9), (name, job, gap)
    assert all(gap > 1e-3 for jobs in others.values() for gap in jobs.values()), others  # the control
