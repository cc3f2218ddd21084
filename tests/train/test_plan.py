"""Compiling for slices that are not here: what is counted, what is refused, and that sharding costs what it should."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.plan import Args, Plan, compiled, prompts, topology, trace_job
from vlm_jax import UserError
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.info import config_of
from vlm_jax.mesh.hlo import collectives
from vlm_jax.published import PUBLISHED

ROOT = Path(__file__).parents[2]
#: A loop of 36 turns around one that says nothing of its turns, as the TPU compiler writes them.
HLO = """\
HloModule program

%inner_condition (p.0: (s32[], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} get-tuple-element(%p.0), index=1
  ROOT %lt.0 = pred[]{:T(512)} compare(%i.0, %limit), direction=LT
}

%outer_condition (p.1: (s32[], s32[])) -> pred[] {
  %constant.9 = u32[]{:T(128)} constant(36)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.9), direction=LT
}

%inner (p.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, to_apply=%add
}

%outer (p.3: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.2 = (bf16[2,8]{1,0:T(8,128)}, f32[2]{0:T(128)S(1)}) all-reduce(%x, %y), channel_id=2, to_apply=%add
  %while.1 = (s32[], bf16[4,8]) while(%t), condition=%inner_condition, body=%inner, metadata={op_name="w"}
}

ENTRY %main (p.4: bf16[4,8]) -> bf16[4,8] {
  %ag = (bf16[4,2]{1,0}, bf16[4,8]{1,0}) all-gather-start(%p.4), channel_id=3, replica_groups=[1,4]<=[4], dimensions={1}
  %agd = bf16[4,8]{1,0} all-gather-done(%ag)
  %while.2 = (s32[], bf16[4,8]) while(%t), condition=%outer_condition, body=%outer, metadata={op_name="w"}
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    found = collectives(HLO, unknown=5)
    # Of 4 chips one lacks three quarters; a sum of 2 comes to as much as it is.
    assert found == {"all-gather": (1, 48), "all-reduce": (36 * (1 + 5), 36 * (32 + 8 + 5 * 64))}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "VL" in name or "Gemma" in name])
def test_prompts_hold_the_models_visual_tokens(name):
    config = config_of(name)
    inputs, question, answer = prompts(config, 2, 1024)
    assert inputs.input_ids.shape == question.shape == answer.shape == (2, 1024)
    assert answer.sum() == 8 and question.sum() == 96 and not (question & answer).any()
    visual = np.asarray(inputs.is_image)
    assert visual.any(1).all() and not (visual & (question | answer)).any()


def line(kind, type_, groups="[4,2]<=[8]"):
    return (
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %c = {type_} {kind}(%p), replica_groups={groups}, channel_id=1\n}}\n"
    )


@pytest.mark.parametrize(
    ("hlo", "bytes_"),
    [
        (line("all-gather", "bf16[8,4]{1,0:T(8,128)}"), 64 / 2),
        (line("all-gather-start", "((bf16[4,4]{1,0}, f32[2]{0}), (bf16[8,4]{1,0}, f32[4]{0}))"), (64 + 16) / 2),
        (line("all-reduce", "f32[8]", "{{0,1,2,3},{4,5,6,7}}"), 2 * 32 * 3 / 4),
        (line("all-reduce-start", "(f32[8], pred[8])"), 32 + 8),
        (line("reduce-scatter", "f32[2]", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"), 8 * 3),
        (line("reduce-scatter-start", "((f32[8]), f32[4], u32[])"), 16),
        (line("all-to-all", "f32[8]", "mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}"), 32 * 7 / 8),
        (line("collective-permute-start", "(f32[8], f32[8], u32[], u32[])"), 32),
    ],
)
def test_bytes_received(hlo, bytes_):
    ((_, (times, size)),) = collectives(hlo, None).items()
    assert (times, size) == (1, bytes_)


def test_a_loop_of_unknown_length_is_not_guessed():
    with pytest.raises(ValueError, match="inner communicates"):
        collectives(HLO, None)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"topology": "v9:2x4"}, "unknown topology 'v9:2x4': give"),
        ({"topology": "v5e"}, "unknown topology 'v5e'"),
        ({"topology": "v5e:3x5"}, "no slice 'v5e:3x5' can be compiled for"),
        ({"mesh": "data=4"}, "4 x 1 x 1 = 4 devices, but there are 8"),
        ({"model": "Qwen3-VL-5B"}, "unknown model 'Qwen3-VL-5B'"),
        ({"model": "mini-qwen3-vl", "mesh": "tensor=8"}, "does not divide the model's 4 heads"),
        ({"batch": 0}, "--batch is 0"),
        ({"model": "Gemma-3-4B", "length": 256}, "does not hold the model's 256 visual tokens"),
        ({"model": "Qwen3-VL-4B", "length": 20}, "does not hold the model's 1 visual tokens and a question"),
        ({"model": "mini-qwen3-vl", "batch": 12}, "--batch 12 cannot be split over data x fsdp = 8"),
        ({"model": "mini-qwen3-vl", "job": "lora", "k": 17}, "--k is 17: the model has 16 modules"),
    ],
)
def test_refusals(changed, says):
    with pytest.raises(UserError) as raised:
        compiled(Args(**changed))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_without_the_compiler(monkeypatch):
    def missing(**how):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr("train.plan.topologies.get_topology_desc", missing)
    monkeypatch.setattr("train.plan.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlm-jax\[tpu-aot\]'"):
        topology("v5e:2x4")


def test_turns_of_the_variants_loop():
    """Counted by hand: every layer runs the chunks in which some variant has begun. 8 layers, 16 variants."""
    model = abstract(config_of("mini-qwen3-vl"))
    job = trace_job(model, Args("mini-qwen3-vl", batch=16, length=1024))
    (bundle,) = job.args[4]
    chunk = bundle.chunk
    assert 1 < chunk < 16
    assert job.unknown == sum(-(-2 * (layer + 1) // chunk) for layer in range(8)) / 8 > 1


@pytest.fixture(scope="module")
def plans():
    """One job on meshes that split samples, and heads too."""
    return {
        mesh: compiled(Args("mini-qwen3-vl", "trace", mesh=mesh, length=256)) for mesh in ("data=8", "data=4,tensor=2")
    }


@pytest.mark.slow
def test_samples_apart_need_no_exchange_in_the_layers(plans):
    """Whatever is exchanged is exchanged outside of the scan over the layers: less often than there are layers."""
    times = sum(times for times, _ in plans["data=8"].collectives.values())
    assert times < config_of("mini-qwen3-vl").text.num_hidden_layers


@pytest.mark.slow
def test_heads_apart_need_two_sums_a_layer(plans):
    """After the attention and after the MLP: of the clean and corrupted run together, and of the variants."""
    depth = config_of("mini-qwen3-vl").text.num_hidden_layers
    reduced = plans["data=4,tensor=2"].collectives["all-reduce"][0]
    assert 4 * depth <= reduced < 4 * depth + depth
    assert plans["data=4,tensor=2"].collectives.get("all-gather", (0, 0))[0] < depth
    assert not {"all-to-all", "collective-permute"} & plans["data=4,tensor=2"].collectives.keys()


@pytest.fixture(scope="module")
def lora():
    return compiled(Args("mini-qwen3-vl", "lora", mesh="fsdp=8", length=256))


@pytest.mark.slow
def test_parameters_apart_are_fetched_in_every_pass(lora):
    """fsdp: every kernel of a layer is put together in the forward pass, where it is run again, and in the backward
    pass; nothing else is."""
    depth, kernels = config_of("mini-qwen3-vl").text.num_hidden_layers, 7
    gathered = lora.collectives["all-gather"][0]
    assert 2 * depth * kernels <= gathered < 3 * depth * kernels, lora.collectives
    assert lora.idle > 0, "the vision tower is there, and not read"


@pytest.mark.slow
def test_editors_train_through_the_vision_tower(lora):
    editors = compiled(Args("mini-qwen3-vl", "edit", mesh="fsdp=8", length=256))
    assert editors.idle == 0 < lora.idle
    assert editors.collectives["all-gather"][0] > 0 and editors.fits


@pytest.mark.slow
def test_dictionaries_are_divided_among_the_chips():
    """Each of eight chips has one of eight layers, with Adam's two moments and the counters; with half of the chips on
    the tensor axis it has two."""
    options = {"latents": 1024, "k": 8, "batch": 64}
    one, two = (compiled(Args("mini-qwen3-vl", "sae", mesh=mesh, **options)) for mesh in ("data=8", "data=4,tensor=2"))
    parameters = (2 * 128 * 1024 + 1024 + 128) * 4
    assert 3 * parameters < one.arguments < 3.2 * parameters and one.fits
    assert 1.9 < two.arguments / one.arguments < 2.1


@pytest.mark.slow
def test_half_the_heads_half_the_weights(plans):
    whole, half = (plans[mesh].arguments for mesh in ("data=8", "data=4,tensor=2"))
    assert 0.4 * whole < half < 0.8 * whole
    assert plans["data=8"].idle > 0


def test_what_does_not_fit_is_said():
    plan = Plan(Args(), 8, 2**33, 0, 2**34, 0, 1e15, 1, {}, 1.0)
    assert not plan.fits and "it does not fit" in str(plan) and "split the parameters further" in str(plan)
    assert str(Plan(Args(), 8, 2**30, 2**30, 0, 0, 1e15, 1, {}, 1.0)).endswith("it fits")


@pytest.mark.slow
def test_the_command(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "train.plan",
            *["--model", "mini-qwen3-vl", "--job", "generate", "--length", "256", "--json"],
            tmp_path / "plan.json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["arguments"] > 2**20
    assert done.stdout.startswith("mini-qwen3-vl, generate on v5e:2x4 (8 chips), mesh data=8")
