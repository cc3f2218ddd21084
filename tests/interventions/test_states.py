"""Every analysis runs on a changed model: with LoRA adapters, under saved interventions, on another split."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import interventions.flow.__main__ as flow
import interventions.lens.__main__ as lens
import interventions.talo.__main__ as talo
import interventions.trace.__main__ as trace
import vlm_jax
from interventions import Add, Gate, save_interventions
from interventions.flow.shares import read_examples
from interventions.kinds.layers import slots
from interventions.options import StateOptions
from interventions.placement.adapters import init_lora, merge, save_peft
from interventions.talo.tables import tabulate
from interventions.trace.options import TraceOptions
from interventions.trace.samples import effects
from interventions.trace.tracing import trace_examples
from vlm_jax.data import load_task

TASK, LIMIT = "mini-okvqa", 3


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[Path, Path]:
    """Two adapters whose B is not zero."""
    model, _ = vlm_jax.load("mini-qwen3-vl")
    folders = []
    for number, names in enumerate((["L1-attn", "L4-mlp"], ["L4-mlp", "L6-attn"])):
        key = jax.random.key(number)
        lora = init_lora(model, names, r=4, alpha=8.0, dropout=0.0, key=key)
        lora = lora.replace(
            weights={site: (a, 0.1 * jax.random.normal(key, b.shape)) for site, (a, b) in lora.weights.items()}
        )
        folders.append(tmp_path_factory.mktemp("adapters") / f"adapter-{number}")
        save_peft(lora, model, folders[-1])
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    save_interventions(file, (Gate.cut(8, [2]),))
    return file


def merged(adapters):
    """The model with both adapters: A B is added to the kernels in NumPy."""
    from safetensors.numpy import load_file

    model, processor = vlm_jax.load("mini-qwen3-vl")
    kernels = {"self_attn.": model.text.layers.self_attn, "mlp.": model.text.layers.mlp}
    for folder in adapters:
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            b = tensors[name.replace("lora_A", "lora_B")]
            layer, part, linear = name.split(".layers.")[1].split(".")[:3]
            kernel = getattr(kernels[f"{part}."], linear).kernel
            kernel[...] = kernel[...].at[int(layer)].add(2.0 * (b @ a).T)  # alpha / r = 2
    return model, processor


def test_adapters_are_added_together(adapters):
    """The control has one of the two."""
    model, _ = vlm_jax.load("mini-qwen3-vl")
    want = merged(adapters)[0]

    class Pinned(dict):
        pin = dict.__setitem__

    run = Pinned()
    found, acting = StateOptions(adapter=adapters).applied(run, model, "mini-qwen3-vl")
    assert acting == () and len(run["adapter"]) == 2
    alone, _ = StateOptions(adapter=adapters[:1]).applied(Pinned(), model, "mini-qwen3-vl")
    gaps = [
        max(float(np.abs(np.asarray(a - b)).max()) for a, b in zip(*map(jax.tree.leaves, (one, want)), strict=True))
        for one in (found, alone)
    ]
    assert gaps[0] < 1e-6 and gaps[1] > 1e-3


@pytest.mark.parametrize("split", ["trace", "test"])
def test_trace(adapters, cut, tmp_path, split):
    """Both adapters and a cut, on either split, as functions of arrays compute it."""
    options = {"limit": LIMIT, "batch": 4, "min_te": -1.0, "eps": 1.0}
    args = trace.Args(task=TASK, adapter=adapters, intervention=(cut,), split=split, out=tmp_path / "run", **options)
    trace.main(args)
    model, processor = merged(adapters)
    examples = load_task(TASK, split=split, limit=LIMIT)
    tracing = TraceOptions(batch=4, min_te=-1.0, eps=1.0)
    want = trace_examples(model, processor, examples, tracing, TASK, interventions=(Gate.cut(8, [2]),))
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [example.id for example in examples]
    np.testing.assert_allclose(effects(lines, want.cells), want.ie, atol=1e-5)
    base = trace_examples(*vlm_jax.load("mini-qwen3-vl"), examples, tracing, TASK)
    assert np.abs(base.ie - want.ie).max() > 1e-2


def test_flow(adapters, tmp_path):
    flow.main(flow.Args(task=(TASK,), limit=LIMIT, adapter=adapters, split="test", batch=4, out=tmp_path / "run"))
    examples = load_task(TASK, split="test", limit=LIMIT)
    want = read_examples(*merged(adapters), examples, 4)
    with np.load(tmp_path / "run" / TASK / "attention.npz") as found:
        np.testing.assert_allclose(found["mass"], want.mass, atol=1e-4)
    assert np.abs(read_examples(*vlm_jax.load("mini-qwen3-vl"), examples, 4).mass - want.mass).max() > 1e-2


def test_talo(adapters, tmp_path):
    args = talo.Args(task=(TASK,), limit=12, adapter=adapters, shot=2, batch=6, draws=10, out=tmp_path / "run")
    talo.main(args)
    examples = load_task(TASK, split="eval", limit=12)
    want, correct = tabulate(*merged(adapters), examples, "attn", interventions=(), batch=6, label="")
    with np.load(tmp_path / "run" / TASK / "table.npz") as found:
        np.testing.assert_array_equal(found["base"], want)
        np.testing.assert_array_equal(found["correct"], correct)


@pytest.mark.parametrize("options", [{"correct_only": True}, {"metric": "logit_difference"}, {}])
def test_named_layers_in_a_trace(tmp_path, options):
    """A steering vector that names its layer acts in every pass of a trace, as a table made by hand does."""
    vector = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    save_interventions(tmp_path / "steer", Add.steer(vector, layer=-2))
    chosen = {"limit": LIMIT, "batch": 4, "out": tmp_path / "run", **how(options)}
    trace.main(trace.Args(task=TASK, intervention=(tmp_path / "steer",), **chosen))
    tracing = TraceOptions(batch=4, **how(options))
    examples = load_task(TASK, split="trace", limit=LIMIT)
    table = Add(vector[None], "text.resid_post", slots(8, [6]))
    want = trace_examples(*vlm_jax.load("mini-qwen3-vl"), examples, tracing, TASK, interventions=(table,))
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(effects(lines, want.cells), want.ie, atol=1e-4)


def how(options):
    return {"min_te": -1.0, "eps": 1.0, **options}


def test_a_layer_that_the_model_lacks_is_refused(tmp_path, capsys):
    """Before anything runs, in every command."""
    save_interventions(tmp_path / "steer", Add.steer(np.ones(128, np.float32), layer=31))
    for command, task in ((trace, TASK), (flow, (TASK,)), (lens, (TASK,)), (talo, (TASK,))):
        with pytest.raises(SystemExit):
            command.main(command.Args(task=task, intervention=(tmp_path / "steer",), limit=30, out=tmp_path / "run"))
        assert "the model has no layer 31" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_merge_is_the_oracle(adapters):
    """One adapter, merged by the library: it is NumPy's sum."""
    model, _ = vlm_jax.load("mini-qwen3-vl")
    from interventions.placement.adapters import load_peft

    leaves = jax.tree.leaves(merge(model, load_peft(model, adapters[0])))
    for one, other in zip(leaves, jax.tree.leaves(merged(adapters[:1])[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_effects_are_of_the_changed_model(adapters, cut, tmp_path):
    """The parquet table of a trace under a cut: the module that is cut has no effect; others have."""
    args = trace.Args(task=TASK, intervention=(cut,), limit=LIMIT, batch=4, min_te=-1.0, eps=1.0, out=tmp_path / "run")
    trace.main(args)
    rows = pq.read_table(tmp_path / "run" / "trace.parquet").to_pylist()
    found = {row["cell"]: abs(row["ie"]) for row in rows}
    assert found["L2-attn"] < 1e-6 < max(found.values())
