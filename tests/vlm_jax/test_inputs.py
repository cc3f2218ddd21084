"""Prompts and their spans on awkward text, images as transformers prepares them, batches, and parts of a batch."""

import dataclasses
import json
import re
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import make_batch, tiny_config, tiny_model
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlm_jax
from train.mini import QWEN_SPECIALS, write_qwen3_vl
from vlm_jax import prompts
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.data import Example
from vlm_jax.data.images import LazyImages
from vlm_jax.errors import UserError
from vlm_jax.families import read_config as read_hf_config
from vlm_jax.families.qwen3_vl import load_processor
from vlm_jax.prompts import P0_PROMPT, PLAIN_PROMPT, batches, encode, positions

AWKWARD = [
    "Question: Answer:",
    "Answer:\n\nQuestion: What is it?\nAnswer:",
    "user\nassistant\n",
    P0_PROMPT,
    P0_PROMPT.replace("{QUESTION}", "Question: Answer:"),
    "{QUESTION}",
    "?",
    " ",
    "\n\n",
    "  two spaces in front and behind  ",
    "\ttab\n\nlines\r\nof all kinds\n",
    "Is the 🦊 by the 👩‍👩‍👧 family, or the 🇯🇵 flag 🏳️‍🌈?",
    "🦊",
    "cafe\u0301 nai\u0308ve e\u0323\u0302",  # combining marks, which the tokeniser composes
    "\u0301starts with a mark",
    "何色ですか。",
    "ما لونه؟",
    "\ue000 private use \ue000",  # the placeholder's own character
    "im_end|> <|im_end <|image_pad| >",  # almost special
    "r\\1 \\g<0> %s {} {0} $1",  # templates of other languages
    "x" * 150,
]
GOLD = ["red", "7", "a b", "été", "🦊🦊", " spaced", "Answer:", "assistant\n", "ZQ7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    write_qwen3_vl(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def config(folder):
    return read_config(folder)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def example(question="What is it?", answer="red", images=(), name="one"):
    return Example(name, tuple(images), question, (answer,))


def written(processor, batch, row, span=None):
    """The text of a row's real tokens, or of those in a span."""
    where = batch.inputs.attention_mask if span is None else batch.spans[span]
    return processor.tokenizer.decode(batch.inputs.input_ids[row][where[row]], clean_up_tokenization_spaces=False)


def runs(mask):
    """(first, past the last) of every unbroken run of a row's mask."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def composed(text):
    return unicodedata.normalize("NFC", text)  # as the tokeniser does


@pytest.fixture(scope="module", params=[P0_PROMPT, PLAIN_PROMPT], ids=["P0", "plain"])
def prompt(request):
    return request.param


@pytest.fixture(scope="module")
def awkward(processor, config, prompt):
    """Every awkward question with some gold answer and 0 to 2 images."""
    images = [(), (picture(64, 64),), (picture(40, 90), picture(120, 30))]
    examples = [
        example(question, GOLD[i % len(GOLD)], images[i % 3], name=f"awkward {i}") for i, question in enumerate(AWKWARD)
    ]
    return examples, encode(examples, processor, config, prompt=prompt)


def test_whole_text(processor, prompt, awkward):
    """The prompt is written out as the template says, with every visual token in its place."""
    for row, one in enumerate(awkward[0]):
        counts = [end - begin for begin, end in runs(awkward[1].spans["image"][row])]
        shown = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts)
        said = prompt.replace("{QUESTION}", one.question)
        turns = f"<|im_start|>user\n{shown}{said}<|im_end|>\n<|im_start|>assistant\n{one.answers[0].strip()}<|im_end|>"
        assert written(processor, awkward[1], row) == composed(turns)


@pytest.mark.parametrize("span", ["question", "answer"])
def test_span_is_the_text_and_nothing_else(processor, awkward, span):
    """Tokens that straddle the boundary may add whitespace, and nothing but whitespace."""
    examples, batch = awkward
    for row, one in enumerate(examples):
        text = composed(one.question if span == "question" else one.answers[0].strip())
        assert re.fullmatch(rf"\s*{re.escape(text)}\s*", written(processor, batch, row, span)), one
        assert len(runs(batch.spans[span][row])) == 1


def test_span_is_the_right_one_of_equal_texts(processor, config):
    """The prompt says "Question:" and "Answer:" too, before the question and the gold that repeat them."""
    batch = encode([example("Question:", "Answer:")], processor, config)
    ids, decode = batch.inputs.input_ids[0], processor.tokenizer.decode
    ((begin, end),) = runs(batch.spans["question"][0])
    assert decode(ids[:begin]).rstrip().endswith("Do not add any explanation.\n\nQuestion:")
    assert decode(ids[end:]).lstrip().startswith("Answer:<|im_end|>\n<|im_start|>assistant\nAnswer:<|im_end|>")
    ((begin, _),) = runs(batch.spans["answer"][0])
    assert decode(ids[:begin]).endswith("assistant\n")


def test_end_of_turn_follows_the_answer(config, awkward):
    _, batch = awkward
    for row in range(len(AWKWARD)):
        (answer,), (end,) = runs(batch.spans["answer"][row]), runs(batch.spans["end"][row])
        assert end == (answer[1], answer[1] + 1) and end[1] == batch.inputs.attention_mask[row].sum()
        assert config.eos_token_ids == (batch.inputs.input_ids[row, end[0]],)


def test_spans_do_not_overlap(awkward):
    spans, mask = awkward[1].spans, awkward[1].inputs.attention_mask
    assert spans.keys() == set(prompts.SPANS)
    np.testing.assert_array_equal(spans["subject"], spans["question"])  # no example names one
    count = sum(span.astype(int) for name, span in spans.items() if name != "subject")
    assert count.max() == 1 and not count[~mask].any()


def test_image_spans(config, awkward):
    """One run of visual tokens per image, as many as its grid makes, and the closing token right behind it."""
    examples, batch = awkward
    ids, images = batch.inputs.input_ids, batch.inputs.images
    counts = iter((images.patch_mask.sum(1) // config.vision.merge).tolist())
    for row, one in enumerate(examples):
        found = runs(batch.spans["image"][row])
        assert [end - begin for begin, end in found] == [next(counts) for _ in one.images]
        assert np.flatnonzero(batch.spans["image_end"][row]).tolist() == [end for _, end in found]
        assert (ids[row][batch.spans["image"][row]] == config.image_token_id).all()
        assert (ids[row][batch.spans["image_end"][row]] == json.loads(config.hf)["vision_end_token_id"]).all()
    assert next(counts, None) is None
    np.testing.assert_array_equal(batch.inputs.image_index >= 0, batch.spans["image"])


def test_without_answer(processor, config, awkward, prompt):
    """The same tokens up to the answer, and no gold to read."""
    examples, whole = awkward
    batch = encode(examples, processor, config, prompt=prompt, with_answer=False)
    assert not batch.spans["answer"].any() and not batch.spans["end"].any()
    for row in range(len(examples)):
        length = batch.inputs.attention_mask[row].sum()
        assert length <= whole.spans["answer"][row].argmax() and length >= whole.spans["question"][row].sum()
        np.testing.assert_array_equal(batch.inputs.input_ids[row, :length], whole.inputs.input_ids[row, :length])
        for span in ("image", "image_end", "question"):
            np.testing.assert_array_equal(batch.spans[span][row, :length], whole.spans[span][row, :length])


def test_tokens_equal_transformers_processor(processor, config):
    """Qwen3VLProcessor expands the image tokens by itself."""
    one = example(images=[picture(40, 90), picture(120, 30)])
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": P0_PROMPT.replace("{QUESTION}", one.question)}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    want = processor(text=[chat], images=list(one.images), return_tensors="np")
    batch = encode([one], processor, config, with_answer=False)
    mask = batch.inputs.attention_mask[0]
    np.testing.assert_array_equal(batch.inputs.input_ids[0, mask], want["input_ids"][0])
    theirs = vlm_jax.Inputs.from_hf(config, **{k: v for k, v in want.items() if k != "mm_token_type_ids"})
    np.testing.assert_array_equal(batch.inputs.position_ids[:, 0, mask], theirs.position_ids[:, 0])


def test_pixels_equal_transformers(folder, awkward, config):
    """Images of several sizes, each prepared alone by transformers' own processor."""
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images = [image for one in awkward[0] for image in one.images]
    ours = awkward[1].inputs.images
    assert len(ours.pixel_values) == len(images) and len({image.size for image in images}) == 3
    for i, image in enumerate(images):
        want = theirs(images=[image], return_tensors="np")
        assert ours.patch_mask[i].sum() == want["image_grid_thw"].prod() == len(want["pixel_values"])
        np.testing.assert_array_equal(ours.pixel_values[i][ours.patch_mask[i]], want["pixel_values"])
        assert ours.grid_positions[i].max(0).tolist() == (want["image_grid_thw"][0, 1:] - 1).tolist()


def test_without_images(processor, config):
    batch = encode([example(), example("?")], processor, config)
    assert batch.inputs.images is None and batch.inputs.image_index is None
    assert not batch.spans["image"].any() and not batch.spans["image_end"].any()


def test_padding(processor, config):
    """On the right, to a multiple of 16 or of the step asked for."""
    examples = [example(), example("What is it? " * 9)]
    for step in (16, 50):
        batch = encode(examples, processor, config, step=step)
        width = batch.inputs.input_ids.shape[1]
        lengths = batch.inputs.attention_mask.sum(1)
        assert width == -(-lengths.max() // step) * step and lengths[0] < lengths[1]
        for row in range(2):
            assert batch.inputs.attention_mask[row, : lengths[row]].all()
            assert (batch.inputs.input_ids[row, lengths[row] :] == config.pad_token_id).all()


@pytest.mark.parametrize("special", QWEN_SPECIALS)
def test_special_token_in_the_text(processor, config, special):
    for bad in (example(f"What is {special}?", name="bad"), example(answer=f"red{special}", name="bad")):
        with pytest.raises(UserError, match=f"'bad'.*{re.escape(special)}"):
            encode([example(), bad], processor, config)


@pytest.mark.parametrize(
    "model, tokenizer, takes", [(512, 512, 512), (100, 512, 100), (512, 100, 100), (100, 1e30, 100)]
)
def test_question_too_long(processor, folder, monkeypatch, model, tokenizer, takes):
    """For the model's positions or for what its tokeniser says, whichever is less."""
    hf = json.loads((folder / "config.json").read_text())
    hf["text_config"]["max_position_embeddings"] = model
    config = read_hf_config(hf, "config.json")
    monkeypatch.setattr(processor.tokenizer, "model_max_length", int(tokenizer))
    fits = example("What is it? " * 10)
    assert 50 < encode([fits], processor, config).inputs.attention_mask.sum() <= 100
    with pytest.raises(UserError, match=rf"'long' has \d+ tokens, but the model takes {takes}: shorten"):
        encode([fits, example("What is it? " * 200, name="long")], processor, config)


def test_positions():
    mask = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    index, valid = positions(mask)
    assert [row[ok].tolist() for row, ok in zip(index, valid, strict=True)] == [[1, 2, 4], [3], []]
    assert index.shape == (3, 3) and positions(mask, 4)[0].shape == positions(mask, 4)[1].shape == (3, 4)


# Batches


def crowd(count):
    """Examples of two lengths, with 0, 1 or 2 images of two sizes."""
    images = [(), (picture(64, 64, 1),), (picture(64, 64, 2), picture(80, 40, 3))]
    return [
        example("What is it? " * (1 + 7 * (i % 4 == 3)) + f"{i}?", images=images[i % 3], name=str(i))
        for i in range(count)
    ]


def pictures(inputs, row):
    """The patches of a row's images, in its order."""
    if inputs.images is None:
        return []
    index = inputs.image_index[row]
    used = dict.fromkeys((index[index >= 0] // inputs.images.stride).tolist())
    return [inputs.images.pixel_values[i][inputs.images.patch_mask[i]] for i in used]


@pytest.mark.parametrize("window", [512, 5])
def test_batches_hold_every_example_once(processor, config, monkeypatch, window):
    monkeypatch.setattr(prompts, "_WINDOW", window)
    examples = crowd(13)
    made = list(batches(examples, processor, config, 4))
    assert sorted(row for rows, _ in made for row in rows) == list(range(13))
    for rows, batch in made:
        count = len(batch.inputs.input_ids)
        assert 1 <= len(rows) <= count <= 4 and all(len(span) == count for span in batch.spans.values())
        assert batch.inputs.position_ids.shape[1] == count
        for place, row in enumerate([*rows, *rows[-1:] * (count - len(rows))]):  # filled up with the last
            alone = encode([examples[row]], processor, config)
            mask = batch.inputs.attention_mask[place]
            length = alone.inputs.attention_mask.sum()
            assert mask.sum() == length == mask[:length].sum()
            np.testing.assert_array_equal(
                batch.inputs.input_ids[place, :length], alone.inputs.input_ids[0, :length], str(row)
            )
            np.testing.assert_array_equal(
                batch.inputs.position_ids[:, place, :length], alone.inputs.position_ids[:, 0, :length]
            )
            for name, span in alone.spans.items():
                np.testing.assert_array_equal(batch.spans[name][place, :length], span[0, :length])
                assert not batch.spans[name][place, length:].any()
            for got, want in zip(pictures(batch.inputs, place), pictures(alone.inputs, 0), strict=True):
                np.testing.assert_array_equal(got, want)


def shapes(made):
    return {str(jax.tree.map(np.shape, batch.inputs)) for _, batch in made}


def test_batches_meet_few_shapes(processor, config):
    examples = crowd(60)
    lengths = encode(examples, processor, config).inputs.attention_mask.sum(1)
    assert len(set(lengths)) > 8  # 60 examples of many lengths
    made = list(batches(examples, processor, config, 4))
    assert len(shapes(made)) == len({-(-length // 16) for length in lengths}) <= 6
    assert len(made) < 60 / 4 + len(shapes(made))


@pytest.mark.parametrize("count, rows", [(1, 1), (3, 4), (5, 8), (9, 16), (15, 16), (16, 16), (17, 16), (40, 16)])
def test_few_examples_are_not_computed_as_many(processor, config, count, rows):
    examples = [example(f"What is it, {i % 10}?", images=(), name=str(i)) for i in range(count)]
    made = list(batches(examples, processor, config, 16))
    assert {len(batch.inputs.input_ids) for _, batch in made} == {rows}
    assert [len(numbers) for numbers, _ in made] == [rows] * (count // rows) + [count % rows] * (count % rows > 0)


def test_a_later_window_has_the_shapes_of_an_earlier_one(processor, config, monkeypatch):
    monkeypatch.setattr(prompts, "_WINDOW", 8)
    examples = [example(f"What is it, {i % 10}?", images=(), name=str(i)) for i in range(10)]
    assert [len(batch.inputs.input_ids) for _, batch in batches(examples, processor, config, 8)] == [8, 8]


def test_aligned_batches_keep_questions_together(processor, config):
    examples = crowd(24)
    made = list(batches(examples, processor, config, 4, align=8))
    assert sorted(row for rows, _ in made for row in rows) == list(range(24))
    assert all(len(set(batch.spans["question"].argmax(1) // 8)) == 1 for _, batch in made)
    loose = list(batches(examples, processor, config, 4))
    assert any(len(set(batch.spans["question"].argmax(1) // 8)) > 1 for _, batch in loose)


def test_batches_pass_options_on(processor, config):
    ((rows, batch),) = batches([example()], processor, config, 2, prompt=PLAIN_PROMPT, with_answer=False)
    assert rows == [0] and not batch.spans["answer"].any()
    assert written(processor, batch, 0) == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("family, types", [("qwen3_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")])
def test_token_types_are_optional(family, types):
    hf = tiny_config(family)
    batch = make_batch([[5, (8, 8), 3], [17], [(8, 8), 9]], config=hf)
    config = read_hf_config(hf.to_dict(), "config.json")
    want = vlm_jax.Inputs.from_hf(config, **batch)
    assert batch.pop(types).any() and (want.image_index >= 0).sum() == 32
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.Inputs.from_hf(config, **batch), want)


def test_arrays_of_another_rank_shape_or_dtype_are_refused(config):
    ids = np.ones((2, 3), np.int64)
    assert vlm_jax.Inputs.from_hf(config, input_ids=ids, attention_mask=ids).input_ids.dtype == np.int32
    for wrong in (
        {"input_ids": ids[0]},
        {"input_ids": ids.astype(np.float32)},
        {"input_ids": ids, "attention_mask": ids[:1]},
        {"input_ids": ids, "mm_token_type_ids": ids[:, :2]},
        {"input_ids": ids, "pixel_values": np.ones((4, 3), int), "image_grid_thw": [[1, 2, 2]]},
    ):
        with pytest.raises(AssertionError):
            vlm_jax.Inputs.from_hf(config, **wrong)


# Parts of a batch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A batch of 4 rows (images of two sizes, and none in the row 2), its logits, and a function that gives logits.

    In float64: matmuls over fewer images add up in another order, as sums over fewer keys do, which in float32 moves
    logits of up to 6.3 by 1.0e-5. What the model computes in float32 whatever it is given (scores, softmax, norms)
    leaves 3.4e-6.
    """
    folder = tmp_path_factory.mktemp("tiny")
    small = {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    tiny_model(tiny_config(text={"num_hidden_layers": 2}, vision=small)).save_pretrained(folder)
    model = vlm_jax.load(folder)[0]
    rows = [[5, (4, 6), 3], [2, (8, 4), 4, (4, 6), 6], [17], [(2, 10), 9]]
    inputs = vlm_jax.Inputs.from_hf(model.config, **make_batch(rows, "right"))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
    forward = jax.jit(lambda inputs: double(inputs).logits)

    def run(inputs):
        with jax.enable_x64(True):
            return np.asarray(forward(inputs))

    return inputs, run(inputs), run


@pytest.mark.parametrize(
    "rows, images, kept",
    [([3, 1], None, 3), ([1, 3, 3], 5, 5), ([2], None, None), ([2, 2], 2, 2)],
    ids=["other order", "repeated, padded", "no image", "no image, padded"],
)
def test_taken_rows_keep_their_logits(tiny, rows, images, kept):
    """Only their own images come along (one that two rows share comes once), and padding images do no harm."""
    inputs, whole, run = tiny
    part = inputs.take(rows, images)
    assert (None if part.images is None else len(part.images.pixel_values)) == kept
    real = part.attention_mask
    np.testing.assert_array_equal(real, inputs.attention_mask[rows])
    np.testing.assert_allclose(run(part)[real], whole[rows][real], atol=1e-5)


def test_cut_rows_keep_their_logits(tiny):
    inputs, whole, run = tiny
    part = inputs.take([0, 3]).cut(16)
    assert part.attention_mask[0].all() and part.attention_mask.shape == (2, 16)
    np.testing.assert_allclose(run(part)[part.attention_mask], whole[[0, 3], :16][part.attention_mask], atol=1e-5)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        assert field.name in ("images", "register_index", "answered") or value.shape[-1] == 16


# Rows of one shape, each with its images


def test_aligned_rows_keep_their_logits(tiny):
    inputs, whole, run = tiny
    alike = inputs.aligned(2, 64)
    assert alike.images.patch_mask.shape == (8, 64)
    real = alike.attention_mask
    np.testing.assert_allclose(run(alike)[real], whole[real], atol=1e-5)
    wrong = alike.replace(image_index=np.where(alike.image_index >= 0, alike.image_index[::-1].max(1)[:, None], -1))
    assert np.abs(run(wrong)[real] - whole[real]).max() > 1e-2


def test_shares_of_a_batch_are_the_batch(tiny):
    """As several processes make it: what one has is what all have, end to end."""
    inputs, *_ = tiny
    whole = inputs.aligned(3, 128).turned()
    shares = [inputs.take(at).aligned(3, 128, at).turned() for at in (np.array([0, 1]), np.array([3]))]
    for at, share in zip((slice(0, 2), slice(3, 4)), shares, strict=True):
        rows = whole.replace(images=None), share.replace(images=None)
        jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b), *rows)
        own = slice(3 * at.start, 3 * at.stop)
        jax.tree.map(lambda a, b, own=own: np.testing.assert_array_equal(a[own], b), whole.images, share.images)
    elsewhere = inputs.take([3]).aligned(3, 128)  # the control: it does not know where it lies
    assert (elsewhere.image_index != shares[1].image_index).any()


def test_a_room_holds_what_each_example_needs(processor, config, monkeypatch):
    examples = crowd(13)
    apart = [encode([example], processor, config) for example in examples]
    with monkeypatch.context() as patched:  # no image is processed for it
        patched.setattr(type(processor.image_processor), "__call__", None)
        room = prompts.room_of(examples, processor, config)
    assert room.length == max(batch.inputs.input_ids.shape[1] for batch in apart)
    assert room.answer == max((batch.spans["answer"] | batch.spans["end"]).sum() for batch in apart)
    assert room.images == 2
    assert room.patches == max(b.inputs.images.patch_mask.shape[1] for b in apart if b.inputs.images is not None)
    shapes = set()
    for example, alone in zip(examples, apart, strict=True):
        inputs, index, valid, where = prompts.fitted([example], room, processor, config)
        assert where is None
        shapes.add(tuple(np.shape(leaf) for leaf in jax.tree.leaves((inputs, index, valid))))
        length = alone.inputs.attention_mask.sum()
        np.testing.assert_array_equal(inputs.input_ids[0, :length], alone.inputs.input_ids[0, :length])
        span = alone.spans["answer"] | alone.spans["end"]
        np.testing.assert_array_equal(index[valid], np.flatnonzero(span[0]))
        for got, want in zip(pictures(inputs, 0), pictures(alone.inputs, 0), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(shapes) == 1


def test_a_room_refuses_what_cannot_be_encoded(processor, config):
    wide = example("What is it?", images=(picture(2000, 4, 1),))
    with pytest.raises(UserError, match="refuses an image"):
        prompts.room_of([wide], processor, config)
    broken = Example("one", LazyImages([lambda: b"no image"], "row 3"), "What is it?", ("red",))
    with pytest.raises(
        UserError, match=r"^row 3, image 1: this is no image in a format that Pillow reads: save it as PNG or JPEG$"
    ):
        prompts.room_of([broken], processor, config)
