"""A head in the files of a tied model, and buffers: what is used is what transformers uses, and not in silence."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hf_oracle import FAMILIES, make_batch, tensors, tiny_config, tiny_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax import UserError, convert
from vlm_jax.checkpoints import redundant
from vlm_jax.checkpoints.leaves import named_leaves

BATCH = make_batch([[7], [4]], "left")
REAL = BATCH["attention_mask"] == 1


def tied_folder(folder: Path, family: str) -> str:
    """Writes a tied model as transformers does, without a head. Returns the name of its embeddings."""
    tiny_model(tiny_config(family, tied=True)).save_pretrained(folder)
    (name,) = (name for name in load_file(folder / "model.safetensors") if "embed_tokens" in name)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return name


def add(folder: Path, **more) -> None:
    """Adds tensors to a folder. A ``__`` in a name stands for a dot."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): value for name, value in more.items()}, file)


def another_head(folder: Path, embeddings: str) -> np.ndarray:
    """Adds a head that is not the embeddings."""
    shape = load_file(folder / "model.safetensors")[embeddings].shape
    head = np.random.default_rng(0).standard_normal(shape, np.float32)
    add(folder, lm_head__weight=head)
    return head


def messages(recwarn, what: str) -> list[str]:
    return [str(w.message) for w in recwarn if what in str(w.message)]


def by_transformers(folder: Path, family: str):
    return FAMILIES[family].model.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda inputs: model(inputs).logits)(vlm_jax.Inputs.from_hf(model.config, **BATCH)))[REAL]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_whose_files_name_only_the_head(tmp_path, family):
    embeddings = tied_folder(tmp_path, family)
    want = logits(vlm_jax.load(tmp_path)[0])
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {"lm_head.weight" if key == embeddings else key: value for key, value in stored.items()},
        tmp_path / "model.safetensors",
    )
    with torch.no_grad():
        theirs = by_transformers(tmp_path, family)(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)]
    found = logits(vlm_jax.load(tmp_path)[0])
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(found, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_the_last_word(tmp_path, recwarn, family):
    folder = tmp_path / "model"
    embeddings = tied_folder(folder, family)
    head = another_head(folder, embeddings)
    theirs = by_transformers(folder, family)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach(), head)  # transformers takes the file's
    model, _ = vlm_jax.load(folder)
    (says,) = messages(recwarn, "ties")
    assert f"config.json ties lm_head.weight to {embeddings}" in says and "tie_word_embeddings to false" in says
    np.testing.assert_array_equal(model.text.lm_head.kernel[...], head.T)

    vlm_jax.save(model, tmp_path / "again")
    recwarn.clear()
    again, _ = vlm_jax.load(tmp_path / "again")
    assert again.config == model.config and messages(recwarn, "ties") == []
    np.testing.assert_array_equal(again.text.lm_head.kernel[...], head.T)
    np.testing.assert_array_equal(by_transformers(tmp_path / "again", family).lm_head.weight.detach(), head)

    config = json.loads((folder / "config.json").read_text())  # what the warning says to do
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    recwarn.clear()
    repaired, _ = vlm_jax.load(folder)
    assert messages(recwarn, "ties") == []
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(named_leaves(repaired)[name], leaf)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3_text"])
def test_logits_with_the_heads_of_the_file(tmp_path, family):
    another_head(tmp_path, tied_folder(tmp_path, family))
    theirs = by_transformers(tmp_path, family)
    with torch.no_grad():
        want = theirs(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)].numpy()
        theirs.lm_head.weight.copy_(theirs.get_input_embeddings().weight)
        tied = theirs(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)].numpy()
    with pytest.warns(UserWarning, match="ties"):
        model, _ = vlm_jax.load(tmp_path)
    np.testing.assert_allclose(logits(model), want, atol=2e-4)
    assert np.abs(tied - want).max() > 1  # the control


def test_a_head_that_repeats_the_embeddings(tmp_path, recwarn, monkeypatch):
    """As torch's older files have it. The blocks of a large model are made small here."""
    monkeypatch.setattr(redundant, "_BLOCK", 1000)
    embeddings = tied_folder(tmp_path, "llava")
    plain, _ = vlm_jax.load(tmp_path)
    head = load_file(tmp_path / "model.safetensors")[embeddings]
    add(tmp_path, lm_head__weight=head)
    model, _ = vlm_jax.load(tmp_path)
    assert model.config == plain.config and messages(recwarn, "ties") == []
    head = head.copy()
    head[-1, -1] += 1  # in the last block
    add(tmp_path, lm_head__weight=head)
    model, _ = vlm_jax.load(tmp_path)
    assert not model.config.text.tie_word_embeddings and len(messages(recwarn, "ties")) == 1


def test_precision_of_the_comparison(tmp_path, recwarn):
    """Numbers that differ by rounding are the same in the precision in which the model is loaded."""
    embeddings = tied_folder(tmp_path, "llama")
    add(tmp_path, lm_head__weight=load_file(tmp_path / "model.safetensors")[embeddings].astype(ml_dtypes.bfloat16))
    assert vlm_jax.load(tmp_path, dtype="bfloat16")[0].config.text.tie_word_embeddings
    assert messages(recwarn, "ties") == []
    assert not vlm_jax.load(tmp_path)[0].config.text.tie_word_embeddings
    assert len(messages(recwarn, "ties")) == 1


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda head: head[:-1], "misshapen lm_head.weight"),
        (lambda head: head.ravel(), "misshapen lm_head.weight"),
        (lambda head: head.astype(np.int8), "lm_head.weight is stored as I8"),
        (lambda head: head * np.nan, "lm_head.weight holds NaN"),
    ],
    ids=["rows", "flat", "int8", "NaN"],
)
@pytest.mark.filterwarnings("ignore:.*ties lm_head")
def test_a_damaged_head(tmp_path, spoil, says):
    embeddings = tied_folder(tmp_path, "qwen3")
    add(tmp_path, lm_head__weight=np.ascontiguousarray(spoil(load_file(tmp_path / "model.safetensors")[embeddings])))
    with pytest.raises(UserError, match=says):
        vlm_jax.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*ties lm_head")
def test_converted_and_as_a_text_only_model(tmp_path):
    embeddings = tied_folder(tmp_path / "model", "qwen3_vl")
    head = another_head(tmp_path / "model", embeddings)
    for source, made in (("model", "orbax"), ("orbax", "back")):
        convert.convert(str(tmp_path / source), tmp_path / made)
        model, _ = vlm_jax.load(tmp_path / made)
        np.testing.assert_array_equal(model.text.lm_head.kernel[...], head.T)
        assert json.loads((tmp_path / made / "config.json").read_text())["tie_word_embeddings"] is False
    vlm_jax.save(vlm_jax.load(tmp_path / "model")[0].backbone(), tmp_path / "text")
    np.testing.assert_array_equal(by_transformers(tmp_path / "text", "qwen3").lm_head.weight.detach(), head)


# Buffers


def buffers_of(family: str, folder: Path) -> dict[str, np.ndarray]:
    """Writes a model, and returns buffers as older files have them: frequencies of the first layers, as transformers
    computes them and without their scaling, and positions."""
    model = tiny_model(tiny_config(family))
    model.save_pretrained(folder)
    text = model.config.get_text_config()
    own = [b.numpy() for name, b in model.named_buffers() if "inv_freq" in name and "vis" not in name]
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    size = 2 * len(own[0])
    own.append((1 / rope["rope_theta"] ** (np.arange(0, size, 2) / size)).astype(np.float32))
    found = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": value for i, value in enumerate(own)}
    positions = {name: b.numpy() for name, b in model.named_buffers() if name.endswith("embeddings.position_ids")}
    assert (len(positions) == 1) == (family in ("llava", "gemma3"))
    return found | positions


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava", "llama"])
def test_buffers_that_the_config_determines(tmp_path, recwarn, family):
    buffers = buffers_of(family, tmp_path)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        values = {name: value.astype(dtype) if "inv" in name else value for name, value in buffers.items()}
        add(tmp_path, **values)
        vlm_jax.load(tmp_path)
        assert messages(recwarn, "other numbers") == []


@pytest.mark.parametrize("family, name", [("llava", "position_ids"), ("llava", "inv_freq"), ("llama", "inv_freq")])
@pytest.mark.parametrize(
    "spoil", [lambda x: x[..., ::-1], lambda x: x[..., 1:], lambda x: x * 2], ids=["turned", "cut", "x2"]
)
def test_buffers_with_other_numbers(tmp_path, recwarn, family, name, spoil):
    """Read as transformers reads them, which uses its own numbers, but not in silence."""
    buffers = buffers_of(family, tmp_path)
    plain = named_leaves(vlm_jax.load(tmp_path)[0])
    values = {n: np.ascontiguousarray(spoil(x)) for n, x in buffers.items() if n.endswith(name)}
    add(tmp_path, **values)
    model, _ = vlm_jax.load(tmp_path)
    (says,) = messages(recwarn, "other numbers")
    assert all(n in says for n in values) and str(tmp_path) in says
    for leaf_name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, plain[leaf_name])
