"""P1: what text reads of the image, against NumPy on whole attention maps and against transformers; knock-outs against
one ``generate`` each; and the command."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from hf_oracle import IMAGE, VISION_END, make_batch, tensors, tiny_config, tiny_model
from run_folders import check_run_folder

import interventions.flow.__main__ as command
import interventions.flow.maps as maps_module
import vlm_jax
from interventions import AttentionKnockout, bind, label
from interventions.flow.knockout import (
    EDGES,
    FAILURES,
    edge,
    form,
    judged,
    knocked_out_answers,
    knockouts,
    window_effects,
    window_layers,
)
from interventions.flow.maps import attention_maps
from interventions.flow.shares import Reading, read_examples, text_attention
from interventions.flow.summary import summarise_reading
from interventions.kinds.groups import GROUPS, members
from vlm_jax import Inputs, UserError
from vlm_jax.checkpoints.sources import read_config, resolve
from vlm_jax.config import with_registers
from vlm_jax.data import Example, load_task
from vlm_jax.families import FAMILIES
from vlm_jax.prompts import SPANS, Batch, encode
from vlm_jax.registers import Registers

ROWS = {  # of which the last part is the question
    "qwen3_vl": [[5, (4, 6), 9], [2, (8, 10), 4, (4, 6), 6]],
    "qwen2_5_vl": [[5, (4, 6), 9], [2, (8, 10), 4, (4, 6), 6]],
    "gemma3": [[5, (8, 8), 23], [2, (8, 8), 4, (8, 8), 6]],  # longer than the sliding window
    "llava": [[5, (6, 6), 9], [2, (6, 6), (6, 6), 6]],
}


def tiny(family, folder):
    """The tiny model in transformers and here, its arrays, and the same as a batch."""
    config = tiny_config(family)
    oracle = tiny_model(config, seed=3)
    oracle.save_pretrained(folder)
    model = vlm_jax.load(folder)[0]
    arrays = make_batch(ROWS[family], "right", config=config)
    ids, mask = arrays["input_ids"], arrays["attention_mask"] > 0
    place = np.arange(ids.shape[1])
    question = mask & (place >= mask.sum(1)[:, None] - np.array([[row[-1]] for row in ROWS[family]]))
    spans = dict.fromkeys(SPANS, np.zeros_like(mask)) | {"image": ids == IMAGE, "question": question}
    if family != "llava":
        spans["image_end"] = ids == VISION_END
    return oracle, model, arrays, Batch(Inputs.from_hf(model.config, **arrays), spans, 2)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_reading_equals_sums_over_whole_maps(family, tmp_path):
    _, model, _, batch = tiny(family, tmp_path)
    found, labels = text_attention(model, batch), label(batch)
    whole_maps = jax.jit(lambda m, x: m(x, taps=["text.attn_probs"]).taps["text.attn_probs"])
    probs = np.asarray(whole_maps(model, batch.inputs), np.float64)
    grid = np.linspace(0, 1, 7)
    curves, needed, ratios = found.cumulative(grid), found.needed(0.8), found.ratio()
    for b in range(2):
        is_image, is_end = batch.spans["image"][b], batch.spans["image_end"][b]
        text = batch.inputs.attention_mask[b] & (np.arange(len(is_image)) > is_image.argmax()) & ~is_image & ~is_end
        for layer in range(len(probs)):
            f = probs[layer, b][:, text].sum(1)  # (H, T): over i in T
            image, end = f[:, is_image].sum(1), f[:, is_end].sum(1)
            np.testing.assert_allclose(found.share("image")[b, layer], image / text.sum(), atol=1e-5)
            np.testing.assert_allclose(found.share("image_end")[b, layer], end / text.sum(), atol=1e-5)
            np.testing.assert_allclose(found.mass[b, layer].sum(-1), text.sum(), rtol=1e-5)
            np.testing.assert_allclose(ratios[b, layer], image.sum() / (image.sum() + end.sum()), atol=1e-5)
            each = f.mean(0)[is_image]
            np.testing.assert_allclose(found.received[b, layer, : len(each)], each, atol=1e-5)
            assert np.isnan(found.received[b, layer, len(each) :]).all()
            held = np.cumsum(sorted(each, reverse=True)) / each.sum()
            assert needed[b, layer] == (1 + np.flatnonzero(held >= 0.8)[0]) / len(each)
            for x, y in zip(grid, curves[b, layer], strict=True):
                whole = int(x * len(each) + 1e-9)
                low, high = np.concatenate([[0], held, [1]])[whole : whole + 2]
                assert y == pytest.approx(low + (high - low) * (x * len(each) - whole), abs=1e-5)
    assert (found.tokens[:, GROUPS.index("image_end")].sum() == 0) == (family == "llava")
    assert np.isin(labels[batch.spans["question"]], members("question+last")).all()
    if family == "llava":
        assert "ratio" not in summarise_reading(found) and (ratios == 1).all()


def test_reading_equals_transformers(tmp_path):
    oracle, model, arrays, batch = tiny("qwen2_5_vl", tmp_path)
    with torch.no_grad():
        maps = torch.stack(oracle(**tensors(arrays), output_attentions=True).attentions).numpy()  # (L, B, H, T, T)
    found, text = text_attention(model, batch), np.isin(label(batch), members("text"))
    for name in ("image", "image_end"):
        expected = np.einsum("lbhst,bs,bt->blh", maps, text, batch.spans[name]) / text.sum(1)[:, None, None]
        assert expected.max() > 0.02
        np.testing.assert_allclose(found.share(name), expected, atol=1e-5)


def test_uniform_attention_reads_four_fifths_from_four_fifths():
    mass = np.ones((1, 1, 1, len(GROUPS)), np.float32)
    tokens = np.full((1, len(GROUPS)), 10)
    mass[..., GROUPS.index("register")] = tokens[:, GROUPS.index("register")] = 0
    reading = Reading(mass, tokens, np.full((1, 1, 10), 0.1, np.float32))
    np.testing.assert_allclose(reading.cumulative(np.linspace(0, 1, 5))[0, 0], np.linspace(0, 1, 5), atol=1e-6)
    assert reading.uniform() == reading.ratio() == 0.5


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def docvqa():
    return load_task("mini-docvqa", split="trace", limit=3)


def test_maps_of_tokens_sum_to_the_reading(mini, docvqa, monkeypatch):
    """What single tokens attend to, summed over the text, is what the text reads of each image token; another layer's
    is not (the control)."""
    model, processor = mini
    maps, series = attention_maps(model, processor, docvqa[:2])
    assert series == ["mean of heads", *(f"head {head}" for head in range(4))]
    monkeypatch.setattr(maps_module, "_MOST", 60_000)
    alone, names = attention_maps(model, processor, docvqa[:2])
    assert names == ["mean of heads"]
    np.testing.assert_allclose(alone[1].values[:, 0], maps[1].values[:, 0], atol=1e-6)
    reading = read_examples(model, processor, docvqa[:2])
    for one, received, example in zip(maps, reading.received, docvqa, strict=False):
        batch = encode([example], processor, model.config, with_answer=False)
        length = len(one.prompt.tokens)
        assert "".join(one.prompt.tokens).count("Question") == 1 and one.values.shape == (
            8,
            5,
            len(one.queries),
            length,
        )
        np.testing.assert_allclose(one.values.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(one.values[:, 1:].mean(1), one.values[:, 0], atol=1e-6)
        is_text = np.isin(label(batch)[0, one.queries], members("text"))
        visual = one.prompt.places[:, 0] >= 0
        summed = one.values[:, 0, is_text][..., visual].sum(1)
        np.testing.assert_allclose(summed, received, atol=1e-5)
        assert np.abs(summed[1:] - received[:-1]).max() > 0.1
        later = np.arange(length)[None] > np.array(one.queries)[:, None]
        assert (one.values[..., later] == 0).all()  # nothing attends to what comes later


def test_answers_equal_a_loop_of_generate(mini, docvqa):
    model, processor = mini
    edges, layers = ("text:image", "text:image_end"), (None, [0, 1])
    records = knocked_out_answers(*mini, docvqa, edges, modes=["random_mass"], layers=layers, size=4, max_new_tokens=4)
    batch = encode(docvqa, processor, model.config, with_answer=False, step=64)
    cuts = {}
    for e in edges:
        for where in layers:
            cuts[e, str(where), "random_mass"] = AttentionKnockout.between(8, *edge(e), where, mode="random_mass")
    cuts[None, "None", None] = None
    assert len(records) == len(cuts) * len(docvqa)
    for (e, where, mode), cut in cuts.items():
        tokens = vlm_jax.generate(model, batch.inputs, 4, bind([cut] if cut else [], batch))
        expected = processor.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        said = [r["output"] for r in records if (r["edge"], str(r["layers"]), r["mode"]) == (e, where, mode)]
        assert said == [text.strip() for text in expected]


def test_no_picture_gets_around_the_third_edge(mini, docvqa):
    """Masked from image and end of image, text writes the same whatever the picture. Zeroed probabilities (P1's
    equation 3) still tell how much the text would have read; and without the end of image cut, that tells more."""
    model, processor = mini
    other = load_task("mini-okvqa", split="trace", limit=2)[1]
    pair = [docvqa[0], Example("b", other.images, docvqa[0].question, docvqa[0].answers)]
    batch = encode(pair, processor, model.config)
    logits = jax.jit(lambda cut: model(batch.inputs, (cut,)).logits)

    def apart(key, mode):
        cut = knockouts(8, [f"text:{key}"], [None], mode=mode)[0].bound(label(batch))
        first, second = np.asarray(logits(cut))
        return np.abs(first - second)[batch.spans["question"][0]].max()

    assert apart("image+image_end", "pre_softmax") < 1e-4
    assert apart("image", "pre_softmax") > 1e-2
    assert apart("image+image_end", "post_softmax") > 1e-2


@pytest.mark.slow
def test_widest_window_is_every_layer(mini, docvqa):
    effect = window_effects(*mini, docvqa, ["text:image", "writers:question"], 8, size=4)
    assert window_layers(8, 8)[4] == list(range(8)) and window_layers(8, 1) == [[i] for i in range(8)]
    np.testing.assert_allclose(effect.window[:, :, 4], effect.whole, rtol=1e-5)
    assert effect.whole[:, 0].mean() < 0.2 * effect.base.mean()


def test_the_last_token_of_the_prompt_writes_the_answer(mini, docvqa):
    model, processor = mini
    for with_answer in (True, False):
        batch = encode(docvqa, processor, model.config, with_answer=with_answer)
        mask, writing = np.asarray(batch.inputs.attention_mask), np.isin(label(batch), members("writers"))
        last = (mask & ~batch.spans["answer"] & ~batch.spans["end"]).sum(1) - 1
        assert (writing.argmax(1) == last).all()
        assert (writing.sum(1) == (batch.spans["answer"] | batch.spans["end"]).sum(1) + 1).all()


def test_what_is_no_answer(mini):
    model, processor = mini
    end = model.config.eos_token_ids[0]
    open_, choice = (Example("a", (), "?", ("42",), choices) for choices in (None, ("42", "moss")))

    def judge(text, example):
        tokens = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end, 0]
        return judged(example, np.array(tokens), processor.tokenizer, [end], {form("17")})

    cases = [("42", open_, None), ("17", open_, None), ("moss", open_, 2), ("1 2", open_, 2), ("", open_, 0)]
    cases += [("moss", choice, None), ("17", choice, 2), (" ", open_, 1)]
    for text, example, failure in cases:
        found = judge(text, example)
        assert found["failure"] == (None if failure is None else FAILURES[failure]), text
        assert found["correct"] == (text == "42")
    assert judge("42", open_)["raw"].startswith("42<")
    assert form("Red  fox 12") == form("big dog 7") != form("dog 7")


# The command


def args(out, **options):
    small = {"task": ("mini-docvqa",), "limit": 2, "batch": 2, "max_new_tokens": 2, "modes": ("post_softmax",)}
    return command.Args(**small | {"edges": ("text:image",), "window_edges": ("text:image",), "out": out} | options)


@pytest.fixture
def refused(capsys, tmp_path):
    def run(**options) -> str:
        with pytest.raises(SystemExit) as stop:
            command.main(args(tmp_path / "out", **options))
        assert stop.value.code == 2 and not (tmp_path / "out").exists()
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    return run


@pytest.mark.parametrize(
    "options, says",
    [
        ({"edges": ("text:imag",)}, "did you mean 'image'"),
        ({"edges": ("text",)}, "such as text:image"),
        ({"window_edges": ("quest:image",)}, "did you mean 'question'"),
        ({"window_edges": ()}, "--window-edges is empty"),
        ({"modes": ("post_softmax", "post_softmax")}, "none twice"),
        ({"task": ("mini-docvqa", "mini-docvqa")}, "--task is mini-docvqa mini-docvqa"),
        ({"task": ()}, "--task is empty"),
        ({"window": 9}, "choose 1 to 8"),
        ({"window": 0}, "at least 1"),
        ({"task": ("mini-docvq",)}, "did you mean 'mini-docvqa'"),
        ({"model": "mini-qwen3"}, "did you mean 'mini-qwen3-vl'"),
        ({"limit": 0}, "at least 1"),
        ({"batch": 0}, "--batch is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
    ],
)
def test_wrong_input(refused, options, says):
    assert says in refused(**options)


def test_text_alone_is_refused(refused, tmp_path):
    line = {"id": "7", "image": [], "question": "Who?", "answers": ["x"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    assert "'7' has no image" in refused(task=(str(tmp_path / "a.jsonl"),))


def test_llava_has_no_end_of_image(tmp_path, capsys):
    assert FAMILIES["llava"].chat.image_end is None
    llava, qwen = (read_config(resolve(name)) for name in ("mini-llava", "mini-qwen3-vl"))
    for options in ({"edges": ("text:image", "text:image_end")}, {"edges": None, "window_edges": ("text:image_end",)}):
        with pytest.raises(UserError, match=r"no end-of-image token.*: drop text:image_end$"):
            command.edges_of(args(tmp_path, **options), llava)
    assert command.edges_of(args(tmp_path, edges=None), llava) == (["text:image"], ["text:image"])
    assert "note: this model has no end-of-image token" in capsys.readouterr().out
    assert command.edges_of(args(tmp_path, edges=None), qwen)[0] == list(EDGES)


@pytest.mark.parametrize("mask", ["register", "none"])
def test_registers_are_the_end_of_the_image(tmp_path, mask):
    """In the default edges; in windows too, where they hide the image."""
    config = with_registers(read_config(resolve("mini-qwen3-vl")), Registers(4, 5, mask))
    edges, windows = command.edges_of(args(tmp_path, edges=None, window_edges=None), config)
    assert edges == (["text:image", "text:register", "text:image+register"] if mask == "none" else ["text:register"])
    assert windows[:2] == (
        ["text:image", "question:image"] if mask == "none" else ["text:register", "question:register"]
    )
    with pytest.raises(UserError, match="registers in place of an end-of-image token: drop text:image_end"):
        command.edges_of(args(tmp_path, edges=("text:image_end",)), config)
    with pytest.raises(UserError, match="no registers: drop text:register"):
        command.edges_of(args(tmp_path, edges=("text:register",)), read_config(resolve("mini-qwen3-vl")))


def test_attention_to_registers(capsys):
    """Its share is read, and equation 2 sets the image against it; where the image is hidden, all goes there."""
    model, processor = vlm_jax.load("mini-qwen3-vl")
    examples = load_task("mini-okvqa", split="trace", limit=4)
    ratios = {}
    for mask in ("register", "none"):
        registered = model.with_registers(
            Registers(4, processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"), mask)
        )
        reading = read_examples(registered, processor, examples)
        assert (reading.tokens[:, GROUPS.index("register")] == 4).all()
        summary = summarise_reading(reading)
        parts = [np.array(summary[f"to_{name}"]["mean"]) for name in ("before", "image", "register", "text")]
        np.testing.assert_allclose(sum(parts), 1, atol=1e-5)
        ratios[mask] = np.array(summary["ratio"]["mean"])
        assert reading.of_image == (mask == "none") == ("tokens_for_80" in summary)
    assert (ratios["register"] == 0).all() and (ratios["none"] > 0.05).all()


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command.main(args(whole))
    shutil.copytree(whole, cut)
    for name in ("mini-docvqa/samples.jsonl", "mini-docvqa/windows.npz", "results.json", "windows.png"):
        (cut / name).unlink()
    command.main(args(cut))
    check_run_folder(cut, tmp_path / "redrawn")
    assert (cut / "artifacts.json").read_bytes() == (whole / "artifacts.json").read_bytes()
    assert (cut / "results.json").read_text() == (whole / "results.json").read_text()
    for name in ("attention", "cumulative", "answers", "windows"):
        assert (cut / f"{name}.png").read_bytes() == (whole / f"{name}.png").read_bytes()
    samples = [json.loads(line) for line in (cut / "mini-docvqa" / "samples.jsonl").read_text().splitlines()]
    assert [(s["edge"], s["id"][-1]) for s in samples] == [(e, i) for i in "01" for e in (None, "text:image")]
    with pytest.raises(SystemExit):
        command.main(args(cut, seed=1))
    with pytest.raises(UserError, match="no image"):
        read_examples(*vlm_jax.load("mini-qwen3-vl"), [Example("a", (), "Who?", ("x",))], 1)
