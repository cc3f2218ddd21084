"""Attention in windows: window by window it gives what a mask gives, in less work and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import make_batch, tiny_config, tiny_model

import vlm_jax
from interventions import Gate
from vlm_jax.nn import windows
from vlm_jax.nn.layers import attend
from vlm_jax.nn.windows import Windows, attend_in_windows
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap
from vlm_jax.vision import qwen, qwen2_5

SIDE = 4  # of a window, so that at most 16 patches share one


def pictures():
    """The window of every patch, in the processor's order of 2 x 2 patches: a picture whose windows are cut off at its
    edges, and a smaller one with padding."""
    numbers = np.full((2, 80), -1)
    for row, (height, width) in enumerate([(10, 8), (6, 6)]):
        y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        blocks = np.lexsort((x.ravel() % 2, y.ravel() % 2, x.ravel() // 2, y.ravel() // 2))
        numbers[row, : height * width] = (y // SIDE * 9 + x // SIDE).ravel()[blocks]
    return numbers


def arrays(patches=80):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, patches, 3, 8)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("block", [16, 24, 256])
def test_windows_compute_what_a_mask_does(monkeypatch, block):
    """Values and gradients, with blocks that divide the patches or do not."""
    monkeypatch.setattr(windows, "_BLOCK", block)
    number = pictures()
    real = jnp.asarray(number >= 0)[..., None]
    mask = jnp.asarray(number[:, :, None] == number[:, None, :])

    def by_windows(q, k, v, largest=SIDE**2):
        return attend_in_windows(q, k, v, Windows.of(number, largest)) * real

    def by_mask(q, k, v):
        return attend(q, k, v, mask, Probe((), NO_TAPS, Context()), "visual") * real

    def both(attention):
        out, pull = jax.vjp(attention, *arrays())
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    for one, other in zip(both(by_windows), both(by_mask), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    if block == 24:  # the control: keys of a window that lie in another block are left out
        assert np.abs(by_windows(*arrays(), largest=2) - by_mask(*arrays())).max() > 1e-2


def test_work_grows_with_the_patches():
    """The compiled program's own account of a picture of 4,096 patches in 64 windows."""
    number = jnp.asarray(np.arange(4096)[None] // 64)
    shapes = [jax.ShapeDtypeStruct((1, 4096, 16, 80), jnp.float32)] * 3
    program = jax.jit(lambda q, k, v: attend_in_windows(q, k, v, Windows.of(number, 64)))
    compiled = program.lower(*shapes).compile()
    whole = 4 * 4096**2 * 16 * 80  # the products of attention between all patches
    assert 8 * compiled.cost_analysis()["flops"] < whole
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 16 * 4096**2 / 4  # of their scores


def test_the_tower_takes_windows_for_large_pictures(monkeypatch, tmp_path):
    """Qwen2.5-VL's tower on pictures of different sizes: the values of sites, under an intervention at one of them."""
    config = tiny_config("qwen2_5_vl")
    tiny_model(config).save_pretrained(tmp_path)
    model, _ = vlm_jax.load(tmp_path)
    arrays = make_batch([[9, (12, 16), 3], [5, (2, 10), 2, (16, 6), 4]], "left", 0, config)
    inputs = vlm_jax.Inputs.from_hf(model.config, **arrays)
    sites = [f"visual.{name}" for name in ("head_out", "attn_out", "resid_post")]
    halved = Gate({"visual.attn_out": jnp.full(model.depths["visual"], 0.5)})

    def run():
        features, taps = model.features(inputs, (halved,), taps=dict.fromkeys(sites, Tap()))
        real = np.asarray(inputs.images.patch_mask)
        return {name: np.asarray(value)[:, real] for name, value in taps.items()}, features

    masked, features = run()
    monkeypatch.setattr(qwen2_5, "_LONG", 1)
    monkeypatch.setattr(windows, "_BLOCK", 48)
    calls = []
    monkeypatch.setattr(qwen, "attend_in_windows", lambda *args: calls.append(1) or attend_in_windows(*args))
    sorted_, same = run()
    assert calls
    for name in sites:
        np.testing.assert_allclose(sorted_[name], masked[name], atol=1e-5)
    counted = np.asarray(inputs.image_index)
    used = counted[counted >= 0]
    flat = [np.asarray(f.merged).reshape(-1, f.merged.shape[-1])[used] for f in (features, same)]
    np.testing.assert_allclose(*flat, atol=1e-5)
    # The control: windows of another size.
    monkeypatch.setattr(type(model.visual.config), "window_side", 2 * model.visual.config.window_side)
    wider, _ = run()
    assert np.abs(wider["visual.resid_post"] - masked["visual.resid_post"]).max() > 1e-3
