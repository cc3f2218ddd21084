"""Loading: what is refused, both published spellings, precision, and that each slice of a file is read once."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from counted_reads import counted
from full_disk import no_file_larger_than
from safetensors.numpy import load_file, save_file

import vlm_jax
from train import mini
from vlm_jax import Model
from vlm_jax.checkpoints import load as loading
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.checkpoints.orbax import save_orbax
from vlm_jax.checkpoints.sources import MINI, read_config
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES

ROOT = Path(__file__).parents[3]
SOURCE = MINI / "mini-qwen3-vl"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, to spoil."""
    return shutil.copytree(SOURCE, tmp_path / "copy")


def refusal(folder, **how) -> str:
    with pytest.raises(UserError) as error:
        vlm_jax.load(folder, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def respell(folder: Path, change) -> None:
    """Rewrites the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def edit_config(folder: Path, change) -> None:
    """Rewrites ``config.json`` by ``change``, which alters the parsed value in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, file: str) -> None:
    """Turns ``model.safetensors`` into an index that names ``file`` for the second half of the tensors."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    save_file({name: tensors[name] for name in first}, folder / "model-1.safetensors")
    save_file({name: tensors[name] for name in second}, folder / "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded(folder):
    shard(folder, "model-2.safetensors")
    want, got = (named_leaves(vlm_jax.load(path)[0]) for path in (SOURCE, folder))
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf)


@pytest.mark.parametrize("file, says", [("model-3.safetensors", "has no model-3"), ("../../x.safetensors", "outside")])
def test_index_that_names_other_files(folder, file, says):
    shard(folder, file)
    message = refusal(folder)
    assert says in message and file in message


@pytest.mark.parametrize("name", [MOVED := "model.visual.merger.norm.weight", "lm_head.weight", "model.more"])
def test_index_that_names_tensors_that_are_not_there(folder, name):
    """One that is in another file, and two that are nowhere, of which one could be left out without a word."""
    shard(folder, "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert weight_map.get(name) == ("model-2.safetensors" if name == MOVED else None)
    index.write_text(json.dumps({"weight_map": weight_map | {name: "model-1.safetensors"}}))
    message = refusal(folder)
    assert f"names 1 tensor(s) that are not there ({name} in model-1.safetensors)" in message


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": "x" * 300}, {"a": "\0"}, {"a": "."}, {"a": ""}])
def test_index_that_is_none(folder, weight_map):
    shard(folder, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert any(says in message for says in ("no weight_map", "copy has no ", "outside the folder"))


def test_index_and_one_file(folder):
    """transformers takes the one file, others take the index."""
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder, "model-2.safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    assert "holds model.safetensors and an index of other files: remove one" in refusal(folder)


def test_pickle_is_refused_and_not_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    message = refusal(folder)
    assert "pickle" in message and "pytorch_model.bin" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number(folder, value):
    key = "model.language_model.layers.3.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[key] = tensors[key].copy()
        tensors[key][5, 7] = value

    respell(folder, spoil)
    message = refusal(folder)
    assert key in message and "NaN" in message


def test_quantised_tensor(folder):
    key = "model.language_model.layers.3.mlp.up_proj.weight"
    respell(folder, lambda tensors: tensors | {key: tensors[key].astype(np.int8)})
    message = refusal(folder)
    assert key in message and "I8" in message


def test_layers_in_several_precisions(folder):
    """Are one array, of a precision that rounds none of them."""
    names = [f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in (0, 3)]
    values = {names[0]: ml_dtypes.bfloat16, names[1]: np.float16}
    respell(folder, lambda tensors: tensors | {name: tensors[name].astype(dtype) for name, dtype in values.items()})
    stack = vlm_jax.load(folder)[0].text.layers.mlp.up_proj.kernel[...]
    original = vlm_jax.load(SOURCE)[0].text.layers.mlp.up_proj.kernel[...]
    assert stack.dtype == original.dtype
    np.testing.assert_array_equal(stack[1:3], original[1:3])
    for layer, dtype in ((0, ml_dtypes.bfloat16), (3, np.float16)):
        np.testing.assert_array_equal(stack[layer], np.asarray(original[layer]).astype(dtype).astype(stack.dtype))


def test_too_large_for_the_precision(folder):
    key = "model.language_model.layers.3.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[key] = tensors[key].astype(np.float32)
        tensors[key][5, 7] = 1e5

    respell(folder, enlarge)
    vlm_jax.load(folder)
    message = refusal(folder, dtype="float16")
    assert key in message and "too large for float16: load it as float32" in message


def test_every_wrong_tensor_is_named(folder):
    missing = ["model.visual.merger.norm.weight", "model.language_model.layers.3.self_attn.k_norm.weight"]
    extra = ["model.language_model.layers.8.mlp.up_proj.weight", "model.visual.deepstack_merger_list.2.norm.bias"]
    misshapen = ["model.language_model.layers.0.mlp.down_proj.weight", "model.visual.pos_embed.weight"]

    def spoil(tensors):
        for key in missing:
            del tensors[key]
        for key in extra:
            tensors[key] = np.zeros(3, np.float32)
        for key in misshapen:  # the right number of elements, so that only a look at the shape can tell
            tensors[key] = np.ascontiguousarray(tensors[key].T)

    respell(folder, spoil)
    message = refusal(folder)
    assert [key for key in missing + extra + misshapen if key not in message] == []


@pytest.mark.parametrize("keep", [0.5, 0.001], ids=["data", "header"])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "model.safetensors" in refusal(folder)


def test_tensors_of_another_architecture(folder):
    edit_config(folder, lambda config: config.update(config["text_config"], model_type="qwen3"))
    assert "config of a qwen3" in refusal(folder)


def test_projector_of_another_size(tmp_path):
    """A linear projector has one tensor pair, and a folder that says so may hold no second one."""
    folder = tmp_path / "llava"
    untrained(folder, "mini-llava")
    edit_config(folder, lambda config: config.update(mm_projector_type="linear"))
    message = refusal(folder)
    assert "extra multi_modal_projector.linear_2.bias" in message and "missing" not in message
    respell(folder, lambda tensors: {k: x for k, x in tensors.items() if "linear_2" not in k})
    assert vlm_jax.load(folder)[0].visual.multi_modal_projector.linear_1.kernel.shape == (128, 128)
    edit_config(folder, lambda config: config.pop("mm_projector_type"))
    assert "missing multi_modal_projector.linear_2.bias" in refusal(folder)


def test_the_same_tensor_in_both_spellings(tmp_path):
    folder = tmp_path / "gemma"
    untrained(folder, "mini-gemma3")
    respell(folder, lambda t: t | {"model.language_model.norm.weight": t["language_model.model.norm.weight"]})
    message = refusal(folder)
    assert "twice" in message and "language_model.model.norm.weight" in message


def test_pan_and_scan(tmp_path):
    folder = shutil.copytree(MINI / "mini-gemma3", tmp_path / "copy")
    options = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(options | {"do_pan_and_scan": True}))
    assert re.search(r"copy: do_pan_and_scan = True is not supported.*: set it to false in preproc", refusal(folder))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_unknown_precision(dtype):
    assert dtype in refusal("mini-qwen3-vl", dtype=dtype)


def test_precision_on_load(folder, tmp_path):
    """Rounded as NumPy rounds, and said in the config that is saved, in its parts too."""
    edit_config(folder, lambda c: [part.update(dtype="float32") for part in (c["text_config"], c["vision_config"])])
    model, _ = vlm_jax.load(folder, dtype="bfloat16")
    exact = named_leaves(vlm_jax.load(folder)[0])
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(exact[name]).astype(ml_dtypes.bfloat16))
    vlm_jax.save(model, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert {part["dtype"] for part in (config, config["text_config"], config["vision_config"])} == {"bfloat16"}
    assert vlm_jax.load(tmp_path / "half")[0].text.norm.weight[...].dtype == ml_dtypes.bfloat16


def untrained(folder: Path, name: str) -> Model:
    mini.WRITERS[name](folder)
    model = Model(read_config(folder), jax.random.key(3))
    vlm_jax.save(model, folder)
    return model


@pytest.mark.parametrize("name", mini.WRITERS)
def test_every_spelling_loads(tmp_path, name):
    """As published, as published before, and as transformers names its modules."""
    folder = tmp_path / name
    model = untrained(folder, name)
    family = FAMILIES[model.config.family]
    spellings = {
        "modules": family.in_table,
        "hub": lambda key: key.replace("vision_tower.", "vision_tower.vision_model."),
    }
    for spell in spellings.values():
        other = shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        respell(other, lambda tensors, spell=spell: {spell(key): value for key, value in tensors.items()})
        got = named_leaves(vlm_jax.load(other)[0])
        for leaf_name, leaf in named_leaves(model).items():
            np.testing.assert_array_equal(got[leaf_name], leaf)


@pytest.mark.parametrize("size", [10**9, 300_000], ids=["one file", "shards"])
def test_round_trip_is_bit_equal(tmp_path, size):
    vlm_jax.save(vlm_jax.load(SOURCE)[0], tmp_path, shard_bytes=size)
    want = load_file(SOURCE / "model.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    got = {key: value for file in files for key, value in load_file(file).items()}
    assert (len(files) > 5) == (size < 10**6)
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].tobytes() == want[key].tobytes(), key
    again = named_leaves(vlm_jax.load(tmp_path)[0])
    for name, leaf in named_leaves(vlm_jax.load(SOURCE)[0]).items():
        np.testing.assert_array_equal(again[name], leaf)


def test_each_tensor_is_read_once(monkeypatch):
    reads = counted(monkeypatch)
    vlm_jax.load("mini-qwen3-vl")
    assert len(reads) == len(load_file(SOURCE / "model.safetensors"))
    assert set(reads.values()) == {1}


# In a process of its own, which has eight devices.
ON_A_MESH = """
import sys
import jax
import numpy as np
import pytest

sys.path.insert(0, sys.argv[1])
from counted_reads import counted

import vlm_jax
from vlm_jax.checkpoints.leaves import named_leaves

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
reads = counted(pytest.MonkeyPatch())
model, _ = vlm_jax.load("mini-qwen3-vl", mesh=mesh)
assert set(reads.values()) == {1}, "a slice is read twice"
sharded = named_leaves(model)
gate = sharded["text.layers.mlp.gate_proj.kernel"]
assert len(gate.sharding.device_set) == 8
assert {shard.data.shape for shard in gate.addressable_shards} == {(8, 64, 160)}
for name, leaf in named_leaves(vlm_jax.load("mini-qwen3-vl")[0]).items():
    np.testing.assert_array_equal(np.asarray(sharded[name]), np.asarray(leaf))
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh():
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(ROOT / "tests/helpers")],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_saving_replaces_an_orbax_checkpoint(tmp_path):
    model, _ = vlm_jax.load(SOURCE)
    save_orbax(model, tmp_path)
    vlm_jax.save(jax.tree.map(lambda leaf: 2 * leaf, model), tmp_path)
    want, got = (named_leaves(vlm_jax.load(path)[0])["text.norm.weight"] for path in (SOURCE, tmp_path))
    np.testing.assert_array_equal(got, 2 * np.asarray(want))


def test_orbax_that_is_not_a_number(tmp_path):
    model, _ = vlm_jax.load(SOURCE)
    save_orbax(jax.tree.map(lambda leaf: np.nan * leaf, model), tmp_path)
    assert "NaN" in refusal(tmp_path)


def test_orbax_of_whole_numbers(tmp_path):
    model, _ = vlm_jax.load(SOURCE)
    save_orbax(jax.tree.map(lambda leaf: leaf.astype("int8"), model), tmp_path)
    assert "dtype 'int8' is not supported" in refusal(tmp_path)
    shutil.copy(SOURCE / "config.json", tmp_path)
    assert "text.norm.weight is stored as int8" in refusal(tmp_path)


@pytest.mark.parametrize("size", [2_000, 9_000_000], ids=["header", "tensors"])
def test_no_room(tmp_path, size):
    """What was there stays."""
    model, _ = vlm_jax.load(SOURCE)
    (tmp_path / "model.safetensors").write_text("before")
    with no_file_larger_than(size), pytest.raises(UserError, match=r"cannot write .*: free the disk") as error:
        vlm_jax.save(model, tmp_path)
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_key_table_that_reads_another_shape(monkeypatch):
    """A programmer's error: without the check NumPy would broadcast one number over the whole parameter."""
    rows_of = loading.rows_of

    def with_wrong_row(config):
        def wrong(row):
            return row._replace(op=row.op._replace(read=lambda tensor, where: tensor[where][:1]))

        return [(wrong(row) if row.path == "text.norm.weight" else row, leaf) for row, leaf in rows_of(config)]

    monkeypatch.setattr(loading, "rows_of", with_wrong_row)
    with pytest.raises(AssertionError, match=r"key table, .*norm\.weight"):
        vlm_jax.load(SOURCE)
