"""What the command reads of the mini model, against generated answers and plain taps; its run folder, its page, and
what it refuses."""

import base64
import io
import json
import shutil

import jax
import numpy as np
import pytest
from page_reader import read
from PIL import Image
from run_folders import check_run_folder

import interventions.lens.__main__ as command
import vlm_jax
from interventions import AttentionKnockout, save_interventions
from interventions.figures import lens as figures
from interventions.lens.artifacts import LENS
from interventions.lens.maps import grid_of, shown_layers, word_maps
from interventions.lens.options import Args
from interventions.lens.reading import Reading, read_examples
from interventions.lens.summary import records, settled, summarise
from train import mini as mini_models
from vlm_jax import UserError
from vlm_jax.data import Example, load_task
from vlm_jax.prompts import encode
from vlm_jax.registers import Registers
from vlm_jax.runs.page import write_page


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-okvqa", split="trace", limit=3) + load_task("mini-docvqa", split="trace", limit=2)


@pytest.fixture(scope="module")
def reading(mini, examples):
    return read_examples(*mini, examples, size=4, top=3)


def test_the_last_point_is_what_the_model_writes(mini, examples, reading):
    """The first token that it generates from the prompt without an answer; its logits there are the attributed ones."""
    model, processor = mini
    batch = encode(examples, processor, model.config, with_answer=False)
    written = np.asarray(vlm_jax.generate(model, batch.inputs, 1))[:, 0]
    assert reading.words[:, -1, 0].tolist() == written.tolist()
    assert ((reading.rank[:, -1] == 1) == (written == reading.gold)).all()
    last, rows = np.asarray(batch.inputs.attention_mask).sum(1) - 1, np.arange(len(examples))
    logits = np.asarray(model(batch.inputs).logits)[rows, last]
    gold = [processor.tokenizer(e.answers[0], add_special_tokens=False)["input_ids"][0] for e in examples]
    assert reading.gold.tolist() == gold
    others = logits.copy()
    others[rows, gold] = -np.inf
    assert reading.foil.tolist() == others.argmax(1).tolist()
    np.testing.assert_allclose(reading.logit, logits[rows, gold] - others.max(1), atol=1e-3)
    parts = reading.embeddings + (reading.attn + reading.mlp + reading.deepstack + reading.edits).sum(1)
    np.testing.assert_allclose(parts, reading.logit, atol=1e-3)
    assert reading._fields == tuple(LENS.fields)


def test_batches_and_options_change_no_sample(mini, examples, reading):
    one = read_examples(*mini, examples[1:2], size=1, top=1, against="nothing")
    np.testing.assert_allclose(one.p_gold[0], reading.p_gold[1], atol=1e-4)
    np.testing.assert_array_equal(one.words[0], reading.words[1, :, :1])
    assert one.foil.tolist() == [-1] and abs(one.logit[0] - reading.logit[1]) > 0.1


def test_records_and_summary(mini, examples, reading):
    made = records(reading, examples, mini[1].tokenizer)
    for number, record in enumerate(made):
        assert record["id"] == examples[number].id and examples[number].answers[0].startswith(record["gold"])
        assert record["said"] == record["words"][-1][0] and record["correct"] == (record["said"] == record["gold"])
        assert (record["settled"] is not None) == record["correct"]
        assert len(record["words"]) == 9 and len(record["words"][0]) == 3
    ranks = ([1, 1, 1], 0), ([2, 1, 1], 1), ([1, 3, 1], 2), ([1, 1, 2], None)
    assert [settled(np.array(rank)) for rank, _ in ranks] == [point for _, point in ranks]
    summary = summarise(reading)
    np.testing.assert_allclose(summary["lens"]["p_gold"]["mean"], reading.p_gold.mean(0), rtol=1e-6)
    assert summary["lens"]["median_rank"] == np.median(reading.rank, 0).tolist()
    np.testing.assert_allclose(summary["attribution"]["heads"]["mean"], reading.heads.mean(0), atol=1e-6)
    assert set(summary["attribution"]) == {"logit", "embeddings", "attn", "heads", "mlp"}  # the others are 0


@pytest.mark.parametrize("name", ["mini-qwen3-vl", "mini-gemma3", "mini-llava"])
def test_words_of_the_picture_are_those_of_its_tokens(name, examples):
    model, processor = vlm_jax.load(name)
    found = word_maps(model, processor, examples[:1])
    (one,) = found.maps
    batch = encode(examples[:1], processor, model.config, with_answer=False)
    taps = jax.jit(lambda m, x: m(x, taps=["text.embeddings", "text.resid_post"]).taps)(model, batch.inputs)
    streams = np.concatenate([taps["text.embeddings"][None], taps["text.resid_post"]])[:, 0]
    real = np.asarray(batch.inputs.attention_mask)[0]
    probs = np.asarray(jax.nn.softmax(model.unembed(streams[:, real]), -1))
    assert len(found.layers) == len(probs) == len(one.words) and one.values.shape == (len(probs), 2, real.sum())
    np.testing.assert_allclose(one.values[:, 0], probs.max(-1), atol=1e-4)
    gold = processor.tokenizer(examples[0].answers[0], add_special_tokens=False)["input_ids"][0]
    np.testing.assert_allclose(one.values[:, 1], probs[..., gold], atol=1e-4)
    clear = np.sort(probs, -1)[..., -1] - np.sort(probs, -1)[..., -2] > 1e-3
    best = [[processor.tokenizer.decode([int(token)]) for token in layer] for layer in probs.argmax(-1)]
    assert (np.array(one.words)[clear] == np.array(best)[clear]).all() and clear.mean() > 0.9
    rows, columns = one.prompt.grids[0]
    visual = [one.words[3][token] for token in np.flatnonzero(batch.spans["image"][0][real])]
    assert [word for row in grid_of(one, 3) for word in row] == visual and len(visual) == rows * columns
    for point, picture in ((len(probs), 0), (-1, 0), (0, 1)):
        with pytest.raises(UserError, match="count both from 0"):
            grid_of(one, point, picture)


def test_registers_are_read(mini, examples):
    """The text sees the picture only through them, so their words are kept like those of other tokens."""
    model, processor = mini
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    registered = model.with_registers(Registers(4, end, "register"))
    plain, own = (read_examples(m, processor, examples[:2], size=2) for m in (model, registered))
    np.testing.assert_allclose(plain.p_gold[:, 0], own.p_gold[:, 0], atol=1e-5)
    assert np.abs(plain.p_gold[:, -1] - own.p_gold[:, -1]).max() > 1e-3
    tokens = [len(word_maps(m, processor, examples[:1]).maps[0].prompt.tokens) for m in (model, registered)]
    assert tokens[1] == tokens[0] + 3  # of the four, one was there already


# The command


def args(out, **options):
    return Args(**{"task": ("mini-docvqa",), "limit": 3, "batch": 2, "maps": 1, "out": out} | options)


def test_run_folder_page_and_resuming(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command.main(args(whole, task=("mini-docvqa", "mini-okvqa")))
    printed = capsys.readouterr().out
    assert printed.count("embeddings") == 2 and "mini-okvqa: 3 samples, logit(gold) - logit(foil)" in printed
    check_run_folder(whole, tmp_path / "redrawn")
    shutil.copytree(whole, cut)
    for name in (
        "mini-docvqa/samples.jsonl",
        "mini-okvqa/lens.npz",
        "results.json",
        "lens.png",
        "words.json",
        "words.png",
    ):
        (cut / name).unlink()
    command.main(args(cut, task=("mini-docvqa", "mini-okvqa")))
    for name in ("artifacts.json", "results.json", "lens.png", "words.png", "mini-docvqa/samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    page = read(write_page(whole))
    maps = [script for script in page.scripts if "series" in script]
    assert len(maps) == 2 and all(shown["layers"][:2] == ["embeddings", "0"] for shown in maps)
    index = json.loads((whole / "mini-docvqa/token_maps/index.json").read_text())
    (sample,) = next(shown for shown in maps if shown["samples"][0]["task"] == "mini-docvqa")["samples"]
    assert sample["words"] == index["samples"][0]["words"] and len(sample["words"]) == 9 == sample["layers"]
    drawn = json.loads((whole / "words.json").read_text())["data"]["samples"][0]
    assert [point["name"] for point in drawn["points"]] == [f"after layer {layer}" for layer in (1, 3, 5, 7)]
    visual = [word for word, place in zip(sample["words"][4], sample["places"], strict=True) if place is not None]
    assert [word for row in drawn["points"][1]["words"] for word in row] == visual
    results = json.loads((whole / "results.json").read_text())
    with np.load(whole / "mini-okvqa/lens.npz") as arrays:
        one = Reading(**arrays)
    np.testing.assert_allclose(results["mini-okvqa"]["attribution"]["mlp"]["mean"], one.mlp.mean(0), rtol=1e-6)
    with pytest.raises(SystemExit):
        command.main(args(cut, task=("mini-docvqa", "mini-okvqa"), top=2))
    assert "top" in capsys.readouterr().err


def test_under_an_intervention_and_without_a_foil(tmp_path, mini, capsys):
    """With the text cut off from the picture in all layers, the gold word is less likely."""
    cut = AttentionKnockout.between(8, "text", "image+image_end", range(8), mode="pre_softmax")
    save_interventions(tmp_path / "cut.safetensors", [cut])
    for name, options in (
        ("plain", {}),
        ("cut", {"intervention": (tmp_path / "cut.safetensors",), "against": "nothing"}),
    ):
        command.main(args(tmp_path / name, limit=8, batch=8, maps=0, **options))
    assert "8 samples, logit(gold) " in capsys.readouterr().out
    ends = [json.loads((tmp_path / name / "results.json").read_text())["mini-docvqa"] for name in ("plain", "cut")]
    first, second = (end["lens"]["p_gold"]["mean"] for end in ends)
    assert first[0] == pytest.approx(second[0], abs=1e-5) and first[-1] > second[-1] + 0.1
    assert not (tmp_path / "plain/mini-docvqa/token_maps").exists()


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
        ({"top": 0}, "--top is 0"),
        ({"top": 100_000}, "the lens is to keep 100000 words of"),
        ({"limit": 0}, "--limit is 0"),
        ({"maps": -1}, "--maps is -1"),
        ({"layers": (2, 8)}, "--layers names layer 8, but the model has 8: name some from 0 to 7"),
        ({"layers": (-1,)}, "--layers is -1"),
        ({"task": ()}, "--task is empty"),
        ({"task": ("mini-docvq",)}, "did you mean 'mini-docvqa'"),
    ],
)
def test_wrong_input(refused, options, says):
    assert says in refused(**options)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """The backbone of the mini model as a folder."""
    folder = tmp_path_factory.mktemp("text")
    mini_models.WRITERS["mini-qwen3-vl"](folder)
    (folder / "preprocessor_config.json").unlink()
    vlm_jax.save(vlm_jax.load("mini-qwen3-vl")[0].backbone(), folder)
    return str(folder)


def test_text_alone(text_only, tmp_path, refused):
    """A text-only model reads questions without pictures; with pictures it is refused. A model with a vision tower
    reads them too."""
    line = {"id": "7", "image": [], "question": "In which place does the fox live?", "answers": ["swamp"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    for name in (text_only, "mini-qwen3-vl"):
        out = tmp_path / name.replace("/", "")
        command.main(args(out, model=name, task=(str(tmp_path / "a.jsonl"),)))
        check_run_folder(out, tmp_path / "redrawn")
        (sample,) = json.loads((out / "a/token_maps/index.json").read_text())["samples"]
        assert not (out / "words.png").exists() and sample["pictures"] == []
        assert len(sample["words"][0]) == len(sample["tokens"])
        assert "token_maps holds something else" not in " ".join(read(write_page(out)).texts)
    assert "is a text-only model and takes no images" in refused(model=text_only)


def test_an_empty_answer_is_refused(mini):
    with pytest.raises(UserError, match="row 0 has no token of a gold answer"):
        read_examples(*mini, [Example("a", (), "Who?", ("",))], size=1)


def test_default_layers_of_the_figure():
    assert [shown_layers(None, depth) for depth in (1, 2, 3, 8, 36)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [1, 3, 5, 7],
        [8, 17, 26, 35],
    ]
    assert shown_layers((3, 1), 4) == [3, 1]


def test_words_that_a_font_lacks_are_drawn(recwarn, tmp_path):
    """Boxes for them, and no formula of what has dollars."""
    words = [["\u4e2d\u6587", "$x^2$", "\n", " "], ["<|im_end|>", "purple", "", "\U0001fae0"]]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (200, 30, 30)).save(buffer, format="png")
    picture = base64.b64encode(buffer.getvalue()).decode()
    point = {"name": "after layer 0", "words": words, "probability": [[0.1, 0.2, 0.3, 0.4]] * 2}
    drawn = figures.words([{"id": "a", "picture": picture, "points": [point]}])
    drawn.savefig(tmp_path / "words.png")
    texts = [text.get_text() for text in drawn.axes[1].texts]
    box = "\u25a1"
    assert texts == [2 * box, "$x^2$", "\u21b5", "\u2423", "<|im_en\u2026", "purple", "\u2423", box]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
