"""Tokeniser, image processor and model of a folder must belong together: what does not is refused by file and field."""

import dataclasses
import json
import random
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from damage import damage
from model_folders import TEXT
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import vlm_jax
from vlm_jax import Model
from vlm_jax.checkpoints import processors
from vlm_jax.checkpoints.load import load_processor
from vlm_jax.checkpoints.sources import MINI, read_config
from vlm_jax.convert import convert
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.prompts import P0_PROMPT, encode

MODELS = ("mini-qwen3-vl", "mini-gemma3", "mini-llava")
PARTS = ("*.json", "*.jinja")


def parts(model: str, into: Path) -> Path:
    """A copy of an embedded model's folder without its weights."""
    into.mkdir(parents=True)
    for file in (file for pattern in PARTS for file in (MINI / model).glob(pattern)):
        shutil.copyfile(file, into / file.name)
    return into


def change(file: str, **fields):
    """Writes fields of a JSON file; a name with two underscores is one inside of another."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        for name, new in fields.items():
            *outer, field = name.split("__")
            part = value
            for key in outer:
                part = part[key]
            part[field] = new
        (folder / file).write_text(json.dumps(value))

    return apply


def remove(file: str):
    return lambda folder: (folder / file).unlink()


def copied(model: str, *files: str):
    return lambda folder: [shutil.copyfile(MINI / model / file, folder / file) for file in files]


def without_merges(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(value))


def with_wrong_ids(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    one, other = value["added_tokens"][2:4]
    one["id"], other["id"] = other["id"], 0
    (folder / "tokenizer.json").write_text(json.dumps(value))


TOKENIZER, IMAGES = ("tokenizer.json", "tokenizer_config.json"), "preprocessor_config.json"
pixels = partial(change, IMAGES)
NAN = float("nan")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "fault, says",
    [
        (remove("tokenizer.json"), r"tokenizer\.json is missing"),
        (remove(IMAGES), "image processor cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json cannot be read as JSON"),
        (without_merges, r"tokenizer\.json cuts words into single letters"),
        (with_wrong_ids, r"tokenizer\.json: the added token .* cannot have id"),
        (change("tokenizer_config.json", model_max_length=0), r"tokenizer_config\.json: model_max_length = 0"),
        (change("tokenizer_config.json", model_max_length="x"), "model_max_length = 'x'"),
        (change("tokenizer_config.json", eos_token="<end>"), r"tokenizer\.json has 1025 tokens, but vocab_size = 1024"),
        (change("tokenizer_config.json", eos_token="a"), r"tokenizer_config\.json makes 'a' a special token"),
        (change("tokenizer_config.json", split_special_tokens=True), "remove split_special_tokens"),
        (change("generation_config.json", eos_token_id=300), r"config\.json: eos_token_id = 300 .* no special token"),
        (change("generation_config.json", eos_token_id=[2000]), "eos_token_id = 2000 "),
        (change("generation_config.json", pad_token_id=300), "pad_token_id = 300 "),
        (pixels(rescale_factor=0), r"preprocessor_config\.json: rescale_factor = 0 must be"),
        (pixels(rescale_factor=NAN), "rescale_factor = nan"),
        (pixels(do_rescale=False), "do_rescale|image_mean|image_std"),
        (pixels(do_rescale=False, do_normalize=False), "from 0 to 255: correct do_rescale"),
        (pixels(image_std=[0, 0, 0]), r"preprocessor_config\.json: image_std = \[0, 0, 0\]"),
        (pixels(image_std=[0.5, 0.5, 0]), "image_std"),
        (pixels(image_std=[0.5, NAN, 0.5]), "image_std"),
        (pixels(image_mean=[NAN, 0.5, 0.5]), r"preprocessor_config\.json: image_mean = \[nan"),
        (pixels(image_mean=[-1, 0.5, 0.5]), "image_mean"),
        (pixels(image_mean=[0.5, 0.5]), "image_mean"),
        (pixels(image_std=["a", "b", "c"]), r"image_std = \['a', 'b', 'c'\] must be"),
        (pixels(do_normalize=None), "do_normalize = None"),
        (pixels(resample="bicubic"), r"preprocessor_config\.json"),
    ],
)
def test_faults_of_every_family(model, fault, says, tmp_path):
    folder = parts(model, tmp_path / "model")
    assert load_processor(folder, read_config(folder)) is not None  # as it is
    fault(folder)
    with pytest.raises(UserError, match=says) as error:
        load_processor(folder, read_config(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, fault, says",
    [
        ("mini-qwen3-vl", pixels(patch_size=16), "patch_size = 16, but the vision tower in config.json has 8"),
        ("mini-qwen3-vl", pixels(merge_size=1), "merge_size = 1, but the vision tower in config.json has 2"),
        ("mini-qwen3-vl", pixels(temporal_patch_size=1), "temporal_patch_size = 1, but"),
        ("mini-qwen3-vl", pixels(size={"shortest_edge": 5120, "longest_edge": 2304}), "size from 5120 to 2304 pixels"),
        ("mini-qwen3-vl", pixels(size={"shortest_edge": 0, "longest_edge": 0}), "size from 0 to 0 pixels"),
        ("mini-qwen3-vl", change("config.json", image_token_id=1023), "is token 1022, but the image token is 1023"),
        ("mini-qwen3-vl", change("config.json", image_token_id=5000), "is token 1022, but the image token is 5000"),
        ("mini-gemma3", change("config.json", image_token_index=8), "is token 9, but the image token is 8"),
        ("mini-llava", change("config.json", image_token_index=3), "is token 4, but the image token is 3"),
        ("mini-gemma3", pixels(size={"height": 32, "width": 32}), r"the tower takes \(images, 3, 64, 64\)"),
        ("mini-gemma3", pixels(do_resize=False), r"the tower takes \(images, 3, 64, 64\)"),
        ("mini-gemma3", change("tokenizer_config.json", image_token="x"), "image_token = 'x' must be '<image_soft"),
        ("mini-llava", change("tokenizer_config.json", image_token="x"), "image_token = 'x' must be '<image>'"),
        ("mini-gemma3", pixels(do_pan_and_scan=True), "do_pan_and_scan"),
        ("mini-llava", pixels(do_center_crop=True), "belongs to another vision tower"),
        ("mini-llava", copied("mini-qwen3-vl", IMAGES), "preprocessor_config.json"),
        ("mini-qwen3-vl", copied("mini-gemma3", IMAGES), "patch_size = None"),
    ],
)
def test_faults_of_one_family(model, fault, says, tmp_path):
    folder = parts(model, tmp_path / "model")
    fault(folder)
    with pytest.raises(UserError, match=says) as error:
        load_processor(folder, read_config(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("model, other", [(one, two) for one in MODELS for two in MODELS if one != two])
def test_the_tokeniser_of_another_model(model, other, tmp_path):
    """All have 1,024 tokens, so the special tokens tell them apart."""
    folder = parts(model, tmp_path / "model")
    copied(other, *TOKENIZER)(folder)
    with pytest.raises(UserError, match=r"tokenizer|token") as error:
        load_processor(folder, read_config(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("family", TEXT)
def test_faults_of_text_only_models(family, tmp_path):
    TEXT[family](tmp_path / "model")
    folder = tmp_path / "model"
    assert load_processor(folder, read_config(folder)) is not None
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_processor(folder, read_config(folder))


def test_a_vocabulary_of_another_size(tmp_path):
    """A model may have more tokens than its tokeniser, as published ones do, but not fewer, and not twice as many."""
    folder = parts("mini-llava", tmp_path / "model")
    config, found = read_config(folder), []
    for size in (1023, 1024, 1100, 2048, 2049):
        changed = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))
        try:
            load_processor(folder, changed)
            found.append(size)
        except UserError as error:
            assert f"has 1024 tokens, but vocab_size = {size}" in str(error)
    assert found == [1024, 1100, 2048]


def test_load_and_convert_refuse_them(tmp_path):
    folder = shutil.copytree(MINI / "mini-llava", tmp_path / "model")
    vlm_jax.load(folder)
    pixels(rescale_factor=0)(folder)
    with pytest.raises(UserError, match="rescale_factor"):
        vlm_jax.load(folder)
    with pytest.raises(UserError, match="rescale_factor"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
        {"do_normalize": False},
        {"resample": 2},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"rescale_factor": 1, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ],
)
def test_published_normalisations_are_taken(fields, tmp_path):
    for model in MODELS:
        folder = parts(model, tmp_path / model)
        pixels(**fields)(folder)
        assert load_processor(folder, read_config(folder)) is not None


@pytest.mark.parametrize(
    "check, fault",
    [
        ("_check_tokenizer", change("generation_config.json", pad_token_id=300)),
        ("_check_added", with_wrong_ids),
        ("_check_reading", without_merges),
        ("_check_normalisation", pixels(image_mean=[-1, 0.5, 0.5])),
        ("_check_images", pixels(patch_size=16)),
    ],
)
def test_each_check_is_needed(check, fault, tmp_path, monkeypatch):
    """The control: transformers loads these folders."""
    folder = parts("mini-qwen3-vl", tmp_path / "model")
    fault(folder)
    monkeypatch.setattr(processors, check, lambda *args: None)
    assert load_processor(folder, read_config(folder)) is not None


# Generated damage


RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (*size, 3), np.uint8)) for size in ((64, 64), (90, 40))]
QUESTIONS = (
    Example("a", (PICTURES[0],), "What colour is the cat?", ("red",)),
    Example("b", (PICTURES[1],), " Is 42 larger? ", ("no",)),
    Example("c", (), "Where is it?", ("here",)),
)


def read(folder: Path):
    """The model, its processor and the questions' arrays, as a user gets them from a folder without weights."""
    (folder / "model.safetensors").symlink_to(folder.parent / "model.safetensors")
    model, processor = vlm_jax.load(folder)
    if processor is None:
        raise UserError(f"{folder} has no tokeniser")
    asked = QUESTIONS if model.config.vision is not None else [one.without_images() for one in QUESTIONS]
    return model, processor, encode(asked, processor, model.config)


def facts(model, processor, batch):
    """What decides the logits, beside the weights; and how the tokens are shown."""
    shown = processor.tokenizer.batch_decode(np.asarray(batch.inputs.input_ids), skip_special_tokens=True)
    config = dataclasses.replace(model.config, hf="")
    return config, shown, *map(np.asarray, jax.tree.leaves((batch.inputs, batch.spans)))


def as_in_transformers(folder, model, processor, batch):
    """Whether transformers reads the folder as another model, and in the same way: the logits of the first question."""
    example, vision = QUESTIONS[0], model.config.vision is not None
    content = [{"type": "image"}] * vision + [
        {"type": "text", "text": P0_PROMPT.replace("{QUESTION}", example.question)}
    ]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.removeprefix(processor.tokenizer.bos_token or "")
    prepared = processor(text=[text], images=[list(example.images)]) if vision else processor.tokenizer([text])
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    oracle = auto.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        want = (
            oracle(**{name: torch.as_tensor(np.asarray(value)) for name, value in prepared.items()}).logits[0].numpy()
        )
    got = np.asarray(model(batch.inputs).logits)[0, : len(want)]
    return np.abs(got - want).max() < 1e-3 * np.abs(want).max()


@pytest.fixture(scope="module", params=[*MODELS, "qwen3"])
def family_folder(request, tmp_path_factory):
    """A folder without weights, which lie beside it; and its facts."""
    around = tmp_path_factory.mktemp(request.param)
    if request.param in MODELS:
        parts(request.param, around / "whole")
        (around / "model.safetensors").symlink_to(MINI / request.param / "model.safetensors")
    else:
        TEXT[request.param](around / "whole")
        vlm_jax.save(Model(read_config(around / "whole"), jax.random.key(0)), around / "weights")
        (around / "model.safetensors").symlink_to(around / "weights" / "model.safetensors")
    shutil.copytree(around / "whole", around / "read")
    return around / "whole", facts(*read(around / "read"))


def try_damaged(seed: int, whole: Path, want) -> str:
    folder = shutil.copytree(whole, whole.parent / str(seed))
    how = damage(folder, random.Random(seed))
    try:
        found = read(folder)
        same = all(map(np.array_equal, facts(*found), want))
        assert same or as_in_transformers(folder, *found), f"seed {seed}, {how}"
        return "harmless" if same else "another model"
    except UserError as error:
        named = any(name in str(error) for name in (str(folder), "example", "the model's chat template"))
        assert named and "\n" not in str(error), f"{how}: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed}, {how}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(family_folder):
    """Each is refused in a sentence, reads as the whole one, or is another model, which transformers reads so too."""
    results = [try_damaged(seed, *family_folder) for seed in range(20)]
    assert results.count("refused") > 5 and results.count("another model") < 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hundred", range(1, 4))
def test_many_damaged_folders(family_folder, hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        try_damaged(seed, *family_folder)
