"""What a training says of itself."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import meter
from train.loop import LoopOptions, fit
from train.meter import About
from vlm_jax import UserError
from vlm_jax.mesh.chips import TPUS, chip

KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "compile_seconds", "mfu"),
    *("peak_memory_gib", "seconds"),
}
RATE = optax.linear_schedule(0.1, 0.0, 6)


def loss(w, batch, key):
    return jnp.mean((batch @ w - 2) ** 2)


def train(folder, steps=6, **changed):
    def batches(step):
        return np.random.default_rng(step).normal(size=(1, 4, 3)).astype(np.float32)

    about = About(rate=RATE, tokens=100, flops=1e9)
    options = LoopOptions(**changed)
    how = {"folder": folder, "options": options, "about": about, "log_every": 2}
    return fit(loss, jnp.ones(3), batches, {"train": optax.sgd(RATE)}, steps=steps, **how)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_complete(tmp_path):
    train(tmp_path)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [2, 4, 6]
    assert all(record.keys() == KEYS for record in found)
    np.testing.assert_allclose([record["lr"] for record in found], [RATE(1), RATE(3), RATE(5)])
    for record in found:
        assert record["mfu"] is None  # nobody publishes what a CPU could do
        assert record["tokens_per_second"] == pytest.approx(100 / record["step_seconds"], rel=0.2)
        assert 0.05 < record["peak_memory_gib"] < 100
    assert found[0]["compile_seconds"] > 0 and found[-1]["compile_seconds"] < found[0]["compile_seconds"]
    assert found[0]["seconds"] <= found[1]["seconds"] <= found[2]["seconds"]


def test_mfu_is_flops_over_what_the_chip_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "chip", lambda kind: TPUS["v5e"])
    monkeypatch.setattr(meter.jax, "device_count", lambda: 2)
    about = About(flops=197e12)
    watched = meter.Meter(tmp_path, about, 0)
    watched.then -= 10.0
    watched.log(5, {"loss": 1.0})
    # 197e12 FLOPs in about 2 s on two chips of 197e12 a second
    assert records(tmp_path)[0]["mfu"] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_chips_by_their_device_kind(kind, name):
    assert chip(kind) is TPUS[name]
    assert chip("cpu") is None


@pytest.mark.parametrize(
    ("kind", "bytes_"), [("NVIDIA H100 80GB HBM3", 80e9), ("NVIDIA H200", 141e9), ("NVIDIA A100-SXM4-80GB", 80e9)]
)
def test_gpus_by_their_device_kind(kind, bytes_):
    assert chip(kind).memory_bytes == bytes_


def test_rates_that_differ_are_logged_by_label(tmp_path):
    about = About(rate={"a": RATE, "b": optax.constant_schedule(0.5)})
    with meter.Meter(tmp_path, about, 0) as log:
        log.log(1, {"loss": 1.0})
    with meter.Meter(tmp_path, About(rate={"a": RATE, "b": RATE}), 1) as log:
        log.log(2, {"loss": 1.0})
    first, second = records(tmp_path)
    assert first["lr_b"] == 0.5 and first["lr_a"] == pytest.approx(0.1) and "lr" not in first
    assert second["lr"] == pytest.approx(float(RATE(1))) and "lr_a" not in second


def test_a_list_of_numbers_goes_to_trackers_one_by_one():
    assert meter._scalars({"step": 3, "losses": [0.5, None]}) == {"step": 3, "losses/0": 0.5, "losses/1": None}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, track=("tensorboard",))
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    assert all(name.encode() in written for name in KEYS - {"step", "mfu"})


def test_wandb(tmp_path, monkeypatch):
    logged, ended = [], []
    run = types.SimpleNamespace(
        log=lambda record, step: logged.append((step, record)), finish=lambda: ended.append(True)
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: run))
    train(tmp_path, track=("wandb",))
    assert [step for step, _ in logged] == [2, 4, 6] and ended == [True]
    assert [record for _, record in logged] == records(tmp_path)


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(meter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track wandb needs the package wandb: pip install wandb"):
        LoopOptions(track=("wandb",)).check_loop()


def test_step_memory_is_that_of_the_arrays_and_grows_with_them(tmp_path):
    """A step that reads a batch of n x n numbers and multiplies it by itself holds two such arrays."""
    found = {}
    for n in (256, 512):
        (folder := tmp_path / str(n)).mkdir()
        batch = np.ones((1, n, n), np.float32)
        options = {"folder": folder, "options": LoopOptions(step_memory=True), "log_every": 1}
        tx = {"train": optax.sgd(0.1)}
        fit(
            lambda w, x, key: jnp.mean((w * x @ x) ** 2), jnp.ones(()), {0: batch, 1: batch}.get, tx, steps=2, **options
        )
        first, second = records(folder)
        assert first["step_memory_gib"] == second["step_memory_gib"]
        found[n] = first["step_memory_gib"] * 2**30 / (4 * n**2)
    assert all(2 <= arrays < 8 for arrays in found.values()), found


def test_profile(tmp_path):
    train(tmp_path, profile_steps=2)
    assert [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size]


@pytest.mark.parametrize(("name", "value"), [("save_every", 0), ("profile_steps", -1)])
def test_refused_options(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}"):
        LoopOptions(**{name: value}).check_loop()
