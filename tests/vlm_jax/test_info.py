"""The published configs give the published models, and ``vlm_jax.info`` prints what counting by other means gives."""

import copy
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from interventions.placement.adapters import adapter_parameters as placed_parameters
from vlm_jax import UserError, info, load
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.checkpoints.sources import MINI
from vlm_jax.published import PUBLISHED, published_config

ROOT = Path(__file__).parents[2]
#: Billions of parameters, as the model cards say.
BILLIONS = {
    "Qwen3-VL-2B": 2.13,
    "Qwen3-VL-4B": 4.44,
    "Qwen3-VL-8B": 8.77,
    "Qwen3-VL-32B": 33.4,
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.5,
    "Qwen2.5-VL-72B": 73.4,
    "Gemma-3-4B": 4.30,
    "Gemma-3-12B": 12.2,
    "Gemma-3-27B": 27.4,
    "LLaVA-1.5-7B": 7.06,
    "LLaVA-1.5-13B": 13.4,
    "LLaVA-MORE-8B": 8.35,
}


@pytest.fixture
def printed(capsys):
    """What the command says, as text and as label -> number."""

    def run(model, **options) -> tuple[str, dict[str, int]]:
        info.main(info.Args(model=str(model), **options))
        text = capsys.readouterr().out
        numbers = re.findall(r"^  (\S.*?)\s{2,}([\d,]+)(?:  .*)?$", text, re.MULTILINE)
        return text, {label: int(number.replace(",", "")) for label, number in numbers}

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    """Every published config abstracts, to as many parameters as transformers makes of it and the card says."""
    config = published_config(name)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract(config)))
    counts = info.parameter_counts(config)
    hf = copy.deepcopy(PUBLISHED[name])
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[hf["model_type"]].from_dict(hf))
    assert counts["total"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert counts["total"] == pytest.approx(BILLIONS[name] * 1e9, rel=0.01)
    assert counts["total"] == sum(size for part, size in counts.items() if part != "total")
    assert (counts["head"] == 0) == config.text.tie_word_embeddings


@pytest.mark.parametrize("name, expected", [("Qwen3-VL-4B", 132_120_576), ("Gemma-3-4B", 119_209_984)])
def test_published_lora(printed, name, expected):
    """P0's own numbers of LoRA everywhere at rank 64, which placements made for training also have."""
    assert printed(name)[1]["LLM-all"] == expected
    config = published_config(name)
    counts, model = info.lora_parameter_counts(config, 64), abstract(config)
    for placed, label in (["L3-attn"], "one attn module"), (["L3-mlp"], "one mlp module"):
        assert placed_parameters(model, placed, 64) == counts[label]


def test_published_by_hand(printed):
    """Qwen2.5-VL-7B, written out."""
    width, ffn, layers, keys, vocab, vision, hidden = 3584, 18944, 28, 4 * 128, 152064, 1280, 3420
    linears = {"attn": [(width, width), (width, keys), (width, keys), (width, width)]}
    linears["mlp"] = [(width, ffn), (width, ffn), (ffn, width)]
    rank = {kind: sum(16 * (a + b) for a, b in shapes) for kind, shapes in linears.items()}
    decoder = sum(a * b for shapes in linears.values() for a, b in shapes) + (width + 2 * keys) + 2 * width
    block = 4 * vision**2 + 4 * vision + 3 * vision * hidden + 2 * hidden + vision + 2 * vision
    merged = 4 * vision
    expected = {
        "vision tower": 3 * 2 * 14 * 14 * vision + 32 * block,
        "projector": vision + merged * merged + merged + merged * width + width,
        "embeddings": vocab * width,
        "decoder layers": layers * decoder,
        "final norm": width,
        "head": vocab * width,
    }
    total = sum(expected.values())
    expected |= {
        "total": total,
        "LLM-all": layers * sum(rank.values()),
        "attn only": layers * rank["attn"],
        "mlp only": layers * rank["mlp"],
        "one attn module": rank["attn"],
        "one mlp module": rank["mlp"],
        "weights, float32": 4 * total,
        "weights, bfloat16": 2 * total,
        "KV cache per token, float32": 2 * layers * keys * 4,
    }
    text, numbers = printed("Qwen2.5-VL-7B", r=16, dtype="float32")
    assert numbers == expected
    assert "28 layers x 3584, MLP 18944, 28 query and 4 key-value heads of 128, vocabulary 152064" in text
    assert "one per 28 x 28 pixels" in text


@pytest.mark.parametrize("source", ["mini-qwen3-vl", MINI / "mini-qwen3-vl"], ids=["name", "folder"])
def test_embedded(printed, source):
    """The embedded model's tensors, counted in its file."""
    shapes = {k: v.shape for k, v in load_file(MINI / "mini-qwen3-vl" / "model.safetensors").items()}

    def count(pattern: str) -> int:
        return sum(int(np.prod(shape)) for name, shape in shapes.items() if re.match(pattern, name))

    def lora(pattern: str) -> int:
        return sum(4 * sum(shape) for name, shape in shapes.items() if re.search(pattern, name))

    decoder = r"model\.language_model\.layers"
    _, numbers = printed(source, r=4)
    assert numbers == {
        "vision tower": count(r"model\.visual\.(?!merger|deepstack)"),
        "projector": count(r"model\.visual\.(merger|deepstack)"),
        "embeddings": count(r"model\.language_model\.embed"),
        "decoder layers": count(decoder),
        "final norm": count(r"model\.language_model\.norm"),
        "head": 0,
        "total": count(""),
        "LLM-all": lora(rf"{decoder}.*_proj"),
        "attn only": lora(rf"{decoder}.*attn\..*_proj"),
        "mlp only": lora(rf"{decoder}.*mlp\..*_proj"),
        "one attn module": lora(rf"{decoder}\.0\..*attn\..*_proj"),
        "one mlp module": lora(rf"{decoder}\.0\.mlp\..*_proj"),
        "weights, float32": 4 * count(""),
        "weights, bfloat16": 2 * count(""),
        "KV cache per token, bfloat16": 2 * 8 * 2 * 32 * 2,
    }


@pytest.mark.parametrize(
    "name, says",
    [
        ("Gemma-3-4B", ["256 per image of 896 x 896", "29 of 34 layers see 1024 tokens"]),
        ("LLaVA-1.5-7B", ["576 per image of 336 x 336"]),
        ("LLaVA-MORE-8B", ["576 per image of 336 x 336", "vocabulary 128256"]),
        ("Qwen3-VL-2B", ["one per 32 x 32 pixels"]),
    ],
)
def test_shapes_in_words(printed, name, says):
    text, _ = printed(name)
    assert all(words in text for words in says)


def test_text_only(printed, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, **heads}))
    text, numbers = printed(tmp_path)
    assert "vision tower" not in text and "projector" not in text
    assert numbers["embeddings"] == numbers["head"] == 64 * 8
    assert numbers["decoder layers"] == 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8 + 2 * 4)


def refused(capsys, model, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        info.main(info.Args(model=str(model), **options))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


def test_bad_inputs(capsys, tmp_path):
    assert "did you mean 'Qwen3-VL-4B'" in refused(capsys, "Qwen3-VL-4")
    assert "did you mean 'mini-qwen3-vl'" in refused(capsys, "mini-qwen3")
    assert "holds no config.json" in refused(capsys, tmp_path)
    assert "from the hub" in refused(capsys, "nobody/nothing")
    assert "at least 1" in refused(capsys, "Qwen3-VL-4B", r=0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "unsupported architecture 'bert'" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(capsys, tmp_path)


def test_unknown_published_name():
    with pytest.raises(UserError, match="did you mean 'Gemma-3-4B'"):
        published_config("Gemma-3-4")


def test_docs_agree(printed):
    """The table of ``docs/models.md`` has every published model, and its example is what the command prints."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| `[^`]+` \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    counts = {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in rows}
    configs = {name: published_config(name) for name in PUBLISHED}
    assert counts == {
        name: (info.parameter_counts(config)["total"], info.lora_parameter_counts(config, 64)["LLM-all"])
        for name, config in configs.items()
    }
    assert f"$ python -m vlm_jax.info Qwen3-VL-4B\n{printed('Qwen3-VL-4B')[0]}```" in page


@pytest.mark.parametrize(
    "name, says",
    [
        ("Qwen3-VL-4B", "Qwen3-VL-4B is a published model whose weights are needed here"),
        ("", "the model's name is empty"),
        ("mini-qwen3-v", "did you mean 'mini-qwen3-vl'"),
    ],
)
def test_names_without_weights(name, says):
    with pytest.raises(UserError, match=says):
        load(name)
