"""Every family through the whole pipeline: prompts as its own processor makes them, tracing, LoRA and PEFT."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import make_batch, tensors, tiny_config, tiny_model
from model_folders import TEXT, VISION
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import vlm_jax
from interventions import causal_trace
from interventions.engine import prefix
from interventions.placement.adapters import init_lora, lowest_layer, save_peft
from train import mini
from train.trunk import Adapted, adapter_loss, trunk
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.data import Example, load_task
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.families.base import TextProcessor
from vlm_jax.prompts import encode
from vlm_jax.rendering import IMAGE_MARK
from vlm_jax.runs.options import ModelOptions

#: Tests that are about images, or as long with a text-only backbone as with the model around it.
of_vision_models = pytest.mark.parametrize("folder", VISION, indirect=True, scope="module")


@pytest.fixture(scope="module", params=[*VISION, *TEXT])
def folder(request, tmp_path_factory):
    """An untrained model of the family with weights at which every module matters."""
    folder = tmp_path_factory.mktemp("models") / request.param
    (VISION | TEXT)[request.param](folder)
    model = Model(read_config(folder), jax.random.key(0))

    def louder(path, leaf):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), len(leaf_name(path))), leaf.shape)
        return 4 * leaf if leaf_name(path).endswith("kernel") else leaf + 0.2 * noise

    vlm_jax.save(jax.tree_util.tree_map_with_path(louder, model), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return vlm_jax.load(folder)


@pytest.fixture(scope="module")
def examples(loaded):
    """Questions about one image, two and none; the same questions without images for a text-only model."""
    one = [*load_task("knowledge", split="trace", limit=3), *load_task("perception", split="trace", limit=3)]
    several = Example("two", (one[0].images[0], one[3].images[0]), "Which is larger?", ("the first",))
    found = [*one, several, Example("text", (), "What is it?", ("red",))]
    if loaded[0].config.vision is None:
        return [dataclasses.replace(example, images=()) for example in found]
    return found


@pytest.fixture(scope="module")
def oracle(folder, loaded):
    auto = AutoModelForCausalLM if loaded[0].config.vision is None else AutoModelForImageTextToText
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def test_tokens_and_pixels_are_the_processors_own(loaded, examples):
    """What transformers' processor makes of the chat, token for token."""
    model, processor = loaded
    for example in examples:
        ours = encode([example], processor, model.config, prompt="{QUESTION}", with_answer=False)
        texts, pixels = _hf_inputs(processor, [example])
        mask = ours.inputs.attention_mask[0]
        np.testing.assert_array_equal(ours.inputs.input_ids[0][mask], texts["input_ids"][0])
        want = vlm_jax.Inputs.from_hf(model.config, **texts, **pixels)
        assert (want.images is None) == (not example.images)
        if example.images:
            np.testing.assert_array_equal(ours.inputs.images.pixel_values, want.images.pixel_values)
            assert ours.spans["image"].sum() == (want.image_index >= 0).sum() > 0


def test_llavas_crop_and_pad(tmp_path):
    """The two published ways to make an image square: CLIP's processor crops its middle, LLaVA's pads it."""
    wide = Image.new("RGB", (128, 64), "white")
    pixels = {}
    for kind in ("CLIPImageProcessor", "LlavaImageProcessor"):
        folder = tmp_path / kind
        mini.WRITERS["mini-llava"](folder)
        options = json.loads((folder / "preprocessor_config.json").read_text())
        size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True}
        options |= {"image_processor_type": kind, **size, "do_pad": kind == "LlavaImageProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(options))
        config = read_config(folder)
        processor = FAMILIES[config.family].load_processor(folder)
        batch = encode([Example("a", (wide,), "What?", ("x",))], processor, config)
        pixels[kind] = np.asarray(batch.inputs.images.pixel_values).reshape(4, 4, 3, 16, 16)
    assert (pixels["CLIPImageProcessor"] == 1).all()  # the white middle
    padded = pixels["LlavaImageProcessor"]
    assert (padded[1:3] > 0.9).all() and (np.abs(padded[[0, 3]]) < 0.1).all()  # between two grey bands


def test_spans(loaded, examples):
    model, processor = loaded
    batch = encode(examples, processor, model.config)
    decode = processor.tokenizer.decode
    chat = FAMILIES[model.config.family].chat
    for row, example in enumerate(examples):
        ids = np.asarray(batch.inputs.input_ids[row])
        assert decode(ids[batch.spans["question"][row]]).strip() == example.question
        assert decode(ids[batch.spans["answer"][row]]).strip() == example.answers[0]
        assert batch.spans["image_end"][row].sum() == (len(example.images) if chat.image_end else 0)
        end = ids[batch.spans["end"][row]]
        assert set(end.tolist()) <= set(model.config.eos_token_ids) and len(end) == 1


def decided(model, batch):
    """The batch with the model's own words for gold: an untrained model's probability of others is near 0."""
    for nth in range(int(batch.spans["answer"].sum(1).max())):
        said = np.asarray(model(batch.inputs).logits.argmax(-1))
        ids = np.array(batch.inputs.input_ids)
        for row, mask in enumerate(batch.spans["answer"]):
            if mask.sum() > nth:
                at = np.flatnonzero(mask)[nth]
                ids[row, at] = said[row, at - 1]
        batch = batch._replace(inputs=batch.inputs.replace(input_ids=ids))
    return batch


@pytest.mark.slow
@of_vision_models
def test_sweep_equals_naive(loaded, examples):
    model, processor = loaded
    batch = decided(model, encode(examples, processor, model.config))
    noise = 3 * np.random.default_rng(0).standard_normal((*batch.inputs.input_ids.shape, 128), np.float32)
    sweep, naive = (
        causal_trace(model, batch.inputs, batch.spans["question"], batch.spans["answer"], noise=noise, engine=engine)
        for engine in ("sweep", "naive")
    )
    assert np.abs(naive.te).max() > 1e-3  # the noise does something
    assert np.abs(naive.ie).max() > 1e-3
    for name in ("p_clean", "p_corrupt", "te", "ie"):
        np.testing.assert_allclose(getattr(sweep, name), getattr(naive, name), atol=1e-5, err_msg=name)


@pytest.mark.slow
@of_vision_models
def test_shared_prefix_does_not_end_inside_an_image(loaded, examples, monkeypatch):
    """Noise on one visual token: tokens of its image that stand before it see it, where images are bidirectional."""
    model, processor = loaded
    batch = decided(model, encode(examples[:4], processor, model.config))
    place = batch.spans["image"].argmax(1).max() + 9
    noisy = np.zeros_like(batch.spans["question"])
    noisy[:, place] = True
    noise = 20 * np.random.default_rng(0).standard_normal((*noisy.shape, 128), np.float32)

    def errors():
        sweep, naive = (
            causal_trace(model, batch.inputs, noisy, batch.spans["answer"], noise=noise, engine=engine)
            for engine in ("sweep", "naive")
        )
        return np.abs(sweep.p_corrupt - naive.p_corrupt).max(), np.abs(naive.te).max()

    error, effect = errors()
    assert error < 1e-5 and effect > 1e-3
    # The control: without the rule, the families that need it are wrong, and the others are not.
    monkeypatch.setattr(prefix, "outside_blocks", lambda block, start: start)
    error, _ = errors()
    assert (error > 1e-4) == model.config.text.bidirectional_images, (error, effect)


@pytest.mark.slow
@of_vision_models
def test_trunk_and_window_give_the_models_loss(loaded, examples):
    """LoRA training from the cached trunk reads the same loss as a whole forward pass."""
    model, processor = loaded
    batch = encode(examples, processor, model.config)
    lora = init_lora(model, ["L5-attn", "L6-mlp"], r=2, alpha=4, dropout=0.0, key=jax.random.key(0))
    lora = lora.replace(weights=jax.tree.map(lambda a: a + 0.05, lora.weights))
    data = jax.tree.map(jnp.asarray, trunk(model, batch, lowest_layer(lora), size=4))
    got = adapter_loss(Adapted(model, lora, lowest_layer(lora)), data, jax.random.key(0))
    logits = model(batch.inputs, (lora,)).logits[:, :-1]
    scored = (batch.spans["answer"] | batch.spans["end"])[:, 1:]
    logp = jax.nn.log_softmax(logits, -1)
    picked = jnp.take_along_axis(logp, jnp.asarray(batch.inputs.input_ids)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got, -picked[scored].mean(), rtol=1e-5)


@pytest.mark.slow
def test_adapter_in_peft(loaded, oracle, examples, tmp_path):
    """The saved adapter, loaded by peft on transformers' model, gives the same logits."""
    model, processor = loaded
    lora = init_lora(model, ["L1-attn", "L3-mlp"], r=3, alpha=16, dropout=0.0, key=jax.random.key(0))
    lora = lora.replace(weights=jax.tree.map(lambda a: a + 0.03, lora.weights))
    save_peft(lora, model, tmp_path / "adapter")
    texts, pixels = _hf_inputs(processor, examples[:3])
    inputs = vlm_jax.Inputs.from_hf(model.config, **texts, **pixels)
    got = np.asarray(model(inputs, (lora,)).logits)
    assert np.abs(got - np.asarray(model(inputs).logits)).max() > 0.01
    with torch.no_grad():
        peft = PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
        want = peft(**{k: torch.from_numpy(np.asarray(v)) for k, v in {**texts, **pixels}.items()}).logits.numpy()
        peft.unload()
    real = np.asarray(texts["attention_mask"]) == 1
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


def _hf_inputs(processor, examples):
    """What transformers' processor, or a text-only model's tokeniser, makes of the questions."""
    prepare = processor.tokenizer if isinstance(processor, TextProcessor) else processor
    chats = []
    for example in examples:
        content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": example.question}]
        content = example.question if prepare is processor.tokenizer else content
        turns = [{"role": "user", "content": content}]
        text = prepare.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The tokeniser writes one itself.
        chats.append(text.removeprefix(processor.tokenizer.bos_token or ""))
    images = {"images": [list(e.images) for e in examples]} if examples[0].images else {}
    batch = prepare(text=chats, return_tensors="np", padding=True, **images)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    texts = {k: np.asarray(batch[k]) for k in names if k in batch}
    return texts, {k: np.asarray(batch[k]) for k in ("pixel_values", "image_grid_thw") if k in batch}


# Text-only backbones and pixel budgets


def test_text_only_backbone(tmp_path):
    """A base model without a chat template: the user's words, a space, the answer, the tokeniser's own end."""
    folder = tmp_path / "llama"
    mini.WRITERS["mini-llava"](folder)
    whole = json.loads((folder / "config.json").read_text())
    text = whole["text_config"] | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(text))
    for file in ("chat_template.jinja", "preprocessor_config.json"):
        (folder / file).unlink()
    vlm_jax.save(Model(read_config(folder), jax.random.key(0)), folder)
    model, processor = vlm_jax.load(folder)
    batch = encode([Example("a", (), "Where?", ("red",))], processor, model.config)
    ids = np.asarray(batch.inputs.input_ids[0])
    assert processor.tokenizer.convert_ids_to_tokens(ids[batch.spans["answer"][0]]) == ["\u2581red"]
    assert ids[batch.spans["end"][0]].tolist() == [processor.tokenizer.eos_token_id]
    assert ids[0] == processor.tokenizer.bos_token_id and (ids == ids[0]).sum() == 1
    asked = encode([Example("a", (), "Where?", ("red",))], processor, model.config, with_answer=False)
    assert np.isfinite(np.asarray(vlm_jax.generate(model, asked.inputs, 3))).all()
    with pytest.raises(UserError, match="text-only"):
        encode(load_task("mini-okvqa", split="trace", limit=1), processor, model.config)


def test_pixel_budget():
    example = Example("a", (Image.new("RGB", (128, 128)),), "What?", ("x",))
    counts = []
    for most in (1024, 4096):
        model, processor = ModelOptions(min_pixels=256, max_pixels=most).load()
        counts.append(int(encode([example], processor, model.config).spans["image"].sum()))
    assert counts == [4, 16]  # a visual token is 16 x 16 pixels
    with pytest.raises(UserError, match="--max-pixels"):
        ModelOptions(min_pixels=4096, max_pixels=1024).load()
    with pytest.raises(UserError, match="one size"):
        ModelOptions(model="mini-gemma3", max_pixels=1024).load()


def test_control_tokens_in_a_question(loaded):
    """Refused whether the tokeniser names them or only marks them as special. LLaVA's token is the mark of an image."""
    model, processor = loaded
    special = [t for t in processor.tokenizer.added_tokens_decoder.values() if t.special and str(t) != IMAGE_MARK]
    for token in special[:12]:
        with pytest.raises(UserError, match="special token"):
            encode([Example("a", (), f"hi{token}", ("x",))], processor, model.config)


def test_gemma3s_unused_pooling_head_is_accepted(tmp_path):
    """Some folders have SigLIP's head, which Gemma 3 does not read: the logits are transformers' all the same."""
    config = tiny_config("gemma3")
    config.vision_config.vision_use_head = True
    oracle = tiny_model(config)
    oracle.save_pretrained(tmp_path)
    assert any(".head." in name for name in load_file(tmp_path / "model.safetensors"))
    batch = make_batch([[7], [4]], "left")
    model, _ = vlm_jax.load(tmp_path)
    ours = model(vlm_jax.Inputs.from_hf(model.config, **batch)).logits
    with torch.no_grad():
        theirs = oracle(**tensors(batch)).logits.numpy()
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=1e-4)
