"""``vlm_jax.convert``: to Orbax and back without a changed bit, and nothing left behind where it refuses."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_larger_than
from safetensors import SafetensorError
from safetensors.numpy import load_file

import vlm_jax
from vlm_jax import convert
from vlm_jax.checkpoints.leaves import abstract, named_leaves
from vlm_jax.checkpoints.save import with_dtype
from vlm_jax.checkpoints.sources import MINI
from vlm_jax.families import read_config
from vlm_jax.published import PUBLISHED

SOURCE = MINI / "mini-qwen3-vl"


def run(source, destination: Path, **options) -> None:
    convert.main(convert.Args(source=str(source), destination=destination, **options))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "deep" / "orbax"
    run("mini-qwen3-vl", folder)
    return folder


def test_orbax_folder_loads_equal(converted):
    assert (converted / "orbax").is_dir() and not list(converted.glob("*.safetensors"))
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]
    model, processor = vlm_jax.load(converted)
    original, original_processor = vlm_jax.load("mini-qwen3-vl")
    assert model.config == original.config
    assert jax.tree.structure(model) == jax.tree.structure(original)
    for name, leaf in named_leaves(original).items():
        found = named_leaves(model)[name]
        assert found.dtype == leaf.dtype and np.array_equal(found, leaf), name
    assert processor.tokenizer.get_vocab() == original_processor.tokenizer.get_vocab()
    assert processor.image_processor.to_dict() == original_processor.image_processor.to_dict()


def test_there_and_back(converted, tmp_path):
    """Every file of the Hugging Face folder comes back, byte by byte: weights, config, tokeniser, processor."""
    run(converted, tmp_path / "back")
    files = sorted(file.name for file in (tmp_path / "back").iterdir())
    assert files == sorted(file.name for file in SOURCE.iterdir() if file.suffix != ".md")
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (SOURCE / name).read_bytes(), name


def test_there_and_back_as_published(tmp_path):
    """Qwen2.5-VL's flat config and its older tensor names, which are not the library's own spelling, survive."""
    hf = copy.deepcopy(PUBLISHED["Qwen2.5-VL-7B"])
    hf |= {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf["rope_scaling"]["mrope_section"] = [1, 1, 2]
    hf["vision_config"] |= {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    fill = np.random.default_rng(0).standard_normal
    model = jax.tree.map(lambda leaf: fill(leaf.shape, np.float32), abstract(read_config(hf, "test")))
    vlm_jax.save(model, tmp_path / "hub")
    run(tmp_path / "hub", tmp_path / "orbax")
    run(tmp_path / "orbax", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes(), name
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == hf
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "back" / "model.safetensors")


def test_dtype(tmp_path):
    """Stored in another precision, and the config says so; what was rounded once is not rounded again."""
    run("mini-qwen3-vl", tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded, _ = vlm_jax.load("mini-qwen3-vl", dtype="bfloat16")
    run(tmp_path / "half", tmp_path / "back")
    model, _ = vlm_jax.load(tmp_path / "back")
    for name, leaf in named_leaves(model).items():
        assert leaf.dtype == jnp.bfloat16 and np.array_equal(leaf, named_leaves(rounded)[name]), name


def test_dtype_of_parts():
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 8}, "layers": ["float32"]}
    expected = {"dtype": "float16", "text_config": {"torch_dtype": "float16", "hidden_size": 8}, "layers": ["float32"]}
    assert with_dtype(config, "float16") == expected


def test_empty_destination_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    run("mini-qwen3-vl", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a conversion that must refuse and change nothing under ``tmp_path``, and returns its sentence."""

    def attempt(source, destination: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run(source, destination)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and said.out == "" and len(lines) == 1 and said.err.endswith(lines[0] + "\n")
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0]

    return attempt


def test_refusals(refused, tmp_path):
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    shutil.copytree(SOURCE, source)
    assert "did you mean 'mini-qwen3-vl'" in refused("mini-qwen3", out)
    assert "from the hub" in refused("nobody/nothing", out)
    assert "is inside the source" in refused(source, source / "inside" / "deeper")
    assert "is a URL, not a folder" in refused(source, Path("gs://bucket/model"))
    assert "not an empty folder" in refused(source, source)
    assert "not an empty folder" in refused(source, tmp_path)
    assert "not an empty folder" in refused(source, source / "config.json")
    (tmp_path / "file").touch()
    assert "cannot write" in refused(source, tmp_path / "file" / "out")
    (source / "model.safetensors").write_bytes(b"cut short")
    assert "cannot be read as safetensors" in refused(source, out)
    (source / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(source, out)
    (source / "config.json").unlink()
    assert "holds no config.json" in refused(source, out)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "disk is full"),
        ValueError("RESOURCE_EXHAUSTED: disk is full\nmore"),
        SafetensorError("disk is full"),
    ],
    ids=["file", "Orbax", "safetensors"],
)
def test_failure_while_writing(refused, monkeypatch, tmp_path, error):
    """A disk that fills up half-way, as each writer reports it, leaves no half a folder."""

    def fail(*args):
        raise error

    monkeypatch.setattr(shutil, "copyfile", fail)
    assert "disk is full): free the disk" in refused("mini-qwen3-vl", tmp_path / "out")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
def test_no_room(tmp_path, capfd, converted):
    """In both directions nothing is left, not even new folders around the destination."""
    for source in ("mini-qwen3-vl", converted):
        with no_file_larger_than(500_000), pytest.raises(SystemExit):
            run(source, tmp_path / "deep" / "er" / "out")
        assert_one_sentence(capfd.readouterr().err)
        assert list(tmp_path.iterdir()) == []
    run("mini-qwen3-vl", tmp_path / "deep" / "out")


@pytest.mark.slow
def test_no_room_in_a_process_of_its_own(tmp_path):
    """There Orbax's threads print to the terminal. Some arrays are written, and then there is no room."""
    command = f"ulimit -f 4000; exec {sys.executable} -m vlm_jax.convert mini-qwen3-vl {tmp_path / 'out'}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # libtpu would say that it finds no TPU
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_sentence(done.stderr)
    assert list(tmp_path.iterdir()) == []


def assert_one_sentence(said: str) -> None:
    assert said.startswith("error: cannot write ") and said.count("\n") == 1, said
    assert "out (File too large): free the disk" in said


def test_what_orbax_says_is_shown_if_it_succeeds(tmp_path, capsys, monkeypatch):
    save_orbax = convert.save_orbax

    def warn(model, folder):
        print("take care", file=sys.stderr)
        save_orbax(model, folder)

    monkeypatch.setattr(convert, "save_orbax", warn)
    run("mini-qwen3-vl", tmp_path / "out")
    assert "take care" in capsys.readouterr().err


def test_damaged_orbax(refused, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "orbax")
    (tmp_path / "source" / "orbax").mkdir()
    assert "not a readable Orbax checkpoint" in refused(tmp_path / "source", tmp_path / "out")
