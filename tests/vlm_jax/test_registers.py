"""Registers: where they stand, who sees whom, and that nothing is lost when the pictures leave the cache."""

import dataclasses
import importlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import VISION

import vlm_jax
from interventions import AttentionKnockout, bind, causal_trace
from interventions.editing.editors import init_editors
from interventions.engine import prefix
from interventions.kinds.groups import GROUPS, label
from vlm_jax import Inputs, Model, UserError
from vlm_jax.checkpoints.leaves import leaf_name
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.config import with_registers
from vlm_jax.convert import convert
from vlm_jax.data import Example, load_task
from vlm_jax.families import FAMILIES
from vlm_jax.info import describe_shapes, parameter_counts
from vlm_jax.nn.decoder import Decoder
from vlm_jax.nn.visibility import Tokens, visible, visible_to_new
from vlm_jax.prompts import encode
from vlm_jax.registers import MASKS, Registers

generate_module = importlib.import_module("vlm_jax.generate")  # the package's attribute is the function
pytestmark = pytest.mark.usefixtures("quick_programs")
of_vision_models = pytest.mark.parametrize("folder", VISION, indirect=True, scope="module")

# One letter for each token of a row: b and t for text before and behind the first registers, i for image tokens, r for
# registers, - for padding.
TOYS = ("bbiiirrtt", "--birrtiirrt", "tttt-", "biirrrtttt--")


def toy(rows: tuple[str, ...]) -> tuple[np.ndarray, Tokens]:
    letters = np.array([list(row.ljust(max(map(len, rows)), "-")) for row in rows])
    number = np.full(letters.shape, -1)
    for row, column in zip(*np.nonzero(letters == "r"), strict=True):
        number[row, column] = 1 + number[row, column - 1]
    return letters, Tokens(letters != "-", letters == "i", number)


def sees(mask: str, both: bool, letters: np.ndarray, query: int, key: int) -> bool:
    """Whether the token ``query`` of one row sees ``key``, from the definitions of the masks."""
    q, k = letters[query], letters[key]
    if k == "-":
        return False
    between = set(letters[min(query, key) : max(query, key) + 1])
    if key > query:
        together = between == {q}
        return together and ((q == "i" and both) or (q == "r" and mask == "mitre"))
    if mask == "none":
        return True
    if mask == "blind":
        return not (q == "t" and k in "ir")
    if q == "t" and k == "i":
        return False
    if mask == "gist" and q == "t" and k == "b":
        return False
    return not (mask == "mitre" and q == "i" and k == "r")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_those_of_the_definitions(mask, both):
    letters, tokens = toy(TOYS)
    found = np.asarray(visible(tokens, Registers(2, 0, mask), both))
    for row, real in enumerate(tokens.attention_mask):
        for query, key in itertools.product(np.flatnonzero(real), range(letters.shape[1])):
            assert found[row, query, key] == sees(mask, both, letters[row], query, key), (mask, row, query, key)
    plain = np.asarray(visible(tokens._replace(register_index=None), None, both))
    assert (found != plain).any() == (mask != "none")


@pytest.mark.parametrize("mask", MASKS)
def test_new_tokens_see_what_text_at_the_end_sees(mask):
    letters, tokens = toy(tuple(row.rstrip("-") + "t" for row in TOYS))
    registers = Registers(2, 0, mask)
    last = [len(row.rstrip("-")) for row in TOYS]
    expected = np.asarray(visible(tokens, registers))[np.arange(len(TOYS)), last]
    seen = np.asarray(visible_to_new(tokens, registers))
    np.testing.assert_array_equal(seen & (np.arange(letters.shape[1]) <= np.array(last)[:, None]), expected)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """An untrained model of the family with weights at which every module matters."""
    folder = tmp_path_factory.mktemp("models") / request.param
    VISION[request.param](folder)
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
def examples():
    """Questions about one image, two, and none."""
    one = [*load_task("knowledge", split="trace", limit=2), *load_task("perception", split="trace", limit=2)]
    several = Example("two", (one[0].images[0], one[2].images[0]), "Which is larger?", ("the first",))
    return [*one, several, Example("text", (), "What is it?", ("red",))]


def register_token(model, processor) -> int:
    end = FAMILIES[model.config.family].chat.image_end
    return processor.tokenizer.convert_tokens_to_ids(end) if end else model.config.eos_token_ids[0]


def registered(loaded, count=4, mask="register", **options) -> Model:
    model, processor = loaded
    return model.with_registers(Registers(count, register_token(model, processor), mask, **options))


@of_vision_models
@pytest.mark.parametrize("count", [1, 4])
def test_registers_stand_behind_every_image(loaded, examples, count):
    """And nothing else in the prompts changes."""
    model, processor = loaded
    before, after = (encode(examples, processor, m.config) for m in (model, registered(loaded, count)))
    is_register = after.spans["register"]
    images = [len(example.images) for example in examples]
    np.testing.assert_array_equal(is_register.sum(1), count * np.array(images))
    token, has_end = register_token(model, processor), before.spans["image_end"].any()
    for row, number in enumerate(after.inputs.register_index):
        ids, real = after.inputs.input_ids[row], after.inputs.attention_mask[row]
        assert (ids[is_register[row]] == token).all()
        assert number[is_register[row]].tolist() == list(range(count)) * images[row]
        first = np.flatnonzero(number == 0)
        assert after.spans["image"][row, first - 1].all()
        old, span = before.inputs.attention_mask[row], before.spans["image_end"][row]
        kept = ids[real & ~is_register[row]]
        np.testing.assert_array_equal(kept, before.inputs.input_ids[row][old & ~span if has_end else old])
        for name in ("image", "question", "answer", "end"):
            inside, outside = (batch.spans[name][row] for batch in (after, before))
            np.testing.assert_array_equal(ids[inside], before.inputs.input_ids[row][outside])
    labels = label(after)
    np.testing.assert_array_equal(labels == GROUPS.index("register"), is_register)
    assert not (labels == GROUPS.index("image_end")).any()


@of_vision_models
@pytest.mark.parametrize("positions", ["text", "first"])
def test_positions(loaded, examples, positions):
    _, processor = loaded
    config = registered(loaded, 4, positions=positions).config
    one = registered(loaded, 1).config
    many, single = (encode(examples, processor, c).inputs for c in (config, one))
    for row in range(len(examples)):
        new, old = (i.position_ids[:, row, i.attention_mask[row]] for i in (many, single))
        number = many.register_index[row, many.attention_mask[row]]
        extra = number > 0
        if positions == "first":
            np.testing.assert_array_equal(new[:, ~extra], old)
        else:  # everything behind moves on by the registers before it
            np.testing.assert_array_equal(new[:, ~extra], old + np.cumsum(extra)[~extra])
        starts = np.flatnonzero(number == 0)
        for start in starts:
            steps = np.arange(4) if positions == "text" else np.zeros(4, int)
            np.testing.assert_array_equal(new[:, start : start + 4], new[:, [start]] + steps)


@of_vision_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_arrays_of_a_processor_get_the_same_registers(loaded, examples, side):
    model, processor = loaded
    config = registered(loaded, 3).config
    plain, ours = (encode(examples, processor, c, with_answer=False) for c in (model.config, config))
    ids, mask, visual = plain.inputs.input_ids, plain.inputs.attention_mask, plain.spans["image"]
    if side == "left":
        ids, mask, visual = (
            np.stack(
                [np.roll(row, (~real).sum()) for row, real in zip(array, plain.inputs.attention_mask, strict=True)]
            )
            for array in (ids, mask, visual)
        )
    images = [image for example in examples for image in example.images]
    pixels = processor.image_processor(images=images, return_tensors="np")
    pixels = {name: pixels[name] for name in ("pixel_values", "image_grid_thw") if name in pixels}
    found = Inputs.from_hf(config, input_ids=ids, attention_mask=mask, mm_token_type_ids=visual, **pixels)
    assert found.attention_mask[:, -1].all() == (side == "left")
    for row, (a, b) in enumerate(zip(found.attention_mask, ours.inputs.attention_mask, strict=True)):
        for name in ("input_ids", "image_index", "register_index"):
            np.testing.assert_array_equal(getattr(found, name)[row, a], getattr(ours.inputs, name)[row, b])
        np.testing.assert_array_equal(found.position_ids[:, row, a], ours.inputs.position_ids[:, row, b])


def logits_of(model, batch, interventions=()):
    """Of the real tokens only."""
    return np.asarray(model(batch.inputs, interventions).logits)[batch.inputs.attention_mask]


@of_vision_models
def test_the_register_mask_is_a_knock_out_of_text_to_image(loaded, examples):
    """In every layer of the same sequence, before the softmax. The controls: text that sees its images, positions that
    are shifted by one, and a register that sees later text."""
    masked, open_ = registered(loaded), registered(loaded, mask="none")
    batch = encode(examples, loaded[1], masked.config)
    cut = AttentionKnockout.between(masked.depths["text"], "text", "image", mode="pre_softmax")
    wanted = logits_of(open_, batch, bind([cut], batch))
    scale = np.abs(wanted).max()
    assert np.abs(logits_of(masked, batch) - wanted).max() < 1e-5 * scale
    assert np.abs(logits_of(open_, batch) - wanted).max() > 1e-3 * scale
    behind = np.cumsum(batch.spans["register"], 1) > 0
    shifted = batch.inputs.replace(position_ids=batch.inputs.position_ids + (behind & ~batch.spans["register"]))
    assert np.abs(logits_of(masked, batch._replace(inputs=shifted)) - wanted).max() > 1e-3 * scale

    real = Decoder.window

    def too_far(self, *args, **options):
        window = real(self, *args, **options)
        last = batch.inputs.register_index == 3
        later = last[:, :, None] & np.roll(last, 1, 1)[:, None, :]
        return window._replace(mask=window.mask | later, causal=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "window", too_far)
        assert np.abs(logits_of(masked, batch) - wanted).max() > 1e-3 * scale


@of_vision_models
def test_editors_act_under_registers(loaded, examples):
    """On the instruction behind them, and as in the model whose text is cut from its images."""
    masked, open_ = registered(loaded), registered(loaded, mask="none")
    batch = encode(examples, loaded[1], masked.config)
    editors = init_editors(masked, blocks=[0], layers=[0, 1], key=jax.random.key(0))
    editors = tuple(jax.tree.map(lambda leaf: leaf + 0.1 if leaf.dtype == jnp.float32 else leaf, editors).values())
    bound = bind(editors, batch)
    behind = np.cumsum(batch.spans["register"], 1) > 0
    first = bound[-2].where[:5]  # of the rows with images
    assert (first.sum(1) == 4).all() and not (first & (batch.spans["register"] | ~behind)[:5]).any()
    cut = AttentionKnockout.between(masked.depths["text"], "text", "image", mode="pre_softmax")
    wanted = logits_of(open_, batch, bind([*editors, cut], batch))
    scale = np.abs(wanted).max()
    assert np.abs(logits_of(masked, batch, bound) - wanted).max() < 1e-5 * scale
    for control in (logits_of(masked, batch), logits_of(open_, batch, bound)):
        assert np.abs(control - wanted).max() > 1e-3 * scale


def decoded(model, inputs, count, drop) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens ``(B, count)``, and the logits from which each was chosen ``(count, B, vocab)``."""
    seen = []
    real = Decoder.logits

    def watched(self, x):
        logits = real(self, x)
        jax.debug.callback(lambda step: seen.append(np.asarray(step)), logits.reshape(len(x), -1), ordered=True)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "logits", watched)
        held = generate_module.held_tokens(model, inputs) if drop else None
        options = generate_module.decoding(model, count, eos_token_id=(), held=held)
        whole = generate_module.generation_program.__wrapped__
        # A function of its own, because a program that was traced before has no callback.
        tokens = np.asarray(jax.jit(lambda model, inputs: whole(model, inputs, (), options, None))(model, inputs))
        jax.effects_barrier()
    return tokens, np.stack(seen)


def padded_left(inputs: Inputs) -> Inputs:
    def move(array, axis=1):
        rows = np.moveaxis(array, axis, 1) if axis != 1 else array
        return np.stack([np.roll(r, (~m).sum(), -1) for r, m in zip(rows, inputs.attention_mask, strict=True)])

    positions = move(inputs.position_ids.swapaxes(0, 1)).swapaxes(0, 1)
    named = ("input_ids", "attention_mask", "image_index", "register_index")
    return inputs.replace(position_ids=positions, **{name: move(getattr(inputs, name)) for name in named})


@of_vision_models
@pytest.mark.parametrize(
    ("mask", "side"), [("register", "right"), ("register", "left"), ("mitre", "right"), ("gist", "left")]
)
def test_pictures_may_leave_the_cache(loaded, examples, mask, side):
    """Rows with one picture, two and none: the same tokens and logits as with them, and as one masked forward pass."""
    model = registered(loaded, mask=mask)
    inputs = encode(examples, loaded[1], model.config, with_answer=False).inputs
    inputs = padded_left(inputs) if side == "left" else inputs
    held = generate_module.held_tokens(model, inputs)
    assert held < inputs.input_ids.shape[1] - 8
    with_tokens, with_logits = decoded(model, inputs, 6, drop=False)
    tokens, logits = decoded(model, inputs, 6, drop=True)
    np.testing.assert_array_equal(tokens, with_tokens)
    scale = np.abs(with_logits).max()
    assert np.abs(logits - with_logits).max() < 1e-5 * scale
    np.testing.assert_array_equal(vlm_jax.generate(model, inputs, 6, drop_images=True, eos_token_id=()), tokens)
    # All tokens at once, under the mask, for a row with two pictures.
    row = inputs.take([4])
    real = row.attention_mask[0]
    whole = Inputs(
        np.append(row.input_ids[0, real], tokens[4, :-1])[None],
        np.ones((1, real.sum() + 5), bool),
        np.concatenate(
            [
                row.position_ids[:, :, real],
                row.position_ids[:, :, real].max() + 1 + np.tile(np.arange(5), (3, 1, 1)),
            ],
            2,
        ),
        row.images,
        np.append(row.image_index[0, real], [-1] * 5)[None],
        np.append(row.register_index[0, real], [-1] * 5)[None],
    )
    full = np.asarray(model(whole).logits)[0, real.sum() - 1 :]
    assert np.abs(full - logits[:, 4]).max() < 1e-5 * scale


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True, scope="module")
def test_controls_of_dropping(loaded, examples, monkeypatch):
    """What must not pass: a picture that is dropped though text reads it, and slots instead of positions in sliding
    layers."""
    model = registered(loaded, mask="none")
    inputs = encode(examples[:3], loaded[1], model.config, with_answer=False).inputs
    with pytest.raises(UserError, match="mask of its registers is 'none'"):
        vlm_jax.generate(model, inputs, 2, drop_images=True)
    _, kept = decoded(model, inputs, 4, drop=False)
    hidden = registered(loaded)
    monkeypatch.setattr(generate_module, "held_tokens", lambda model, inputs: generate_module.bucket(40))
    monkeypatch.setattr(
        generate_module,
        "visible_to_new",
        lambda tokens, registers: visible_to_new(tokens, hidden.config.text.registers),
    )
    _, dropped = decoded(model, inputs, 4, drop=True)
    assert np.abs(kept[1:] - dropped[1:]).max() > 1e-3 * np.abs(kept).max()
    monkeypatch.undo()

    narrow = dataclasses.replace(hidden.config, text=dataclasses.replace(hidden.config.text, sliding_window=24))
    hidden = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: Model(narrow, jax.random.key(0)))), jax.tree.leaves(hidden)
    )
    _, kept = decoded(hidden, inputs, 4, drop=False)
    _, dropped = decoded(hidden, inputs, 4, drop=True)
    scale = np.abs(kept).max()
    assert np.abs(kept - dropped).max() < 1e-5 * scale
    real = Decoder.visible

    def by_slot(self, seen, queries, keys):
        return real(self, seen, queries, jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape))

    monkeypatch.setattr(Decoder, "visible", by_slot)
    _, wrong = decoded(hidden, inputs, 4, drop=True)
    assert np.abs(kept[1:] - wrong[1:]).max() > 1e-3 * scale


@of_vision_models
def test_saved_and_loaded(loaded, folder, examples, tmp_path):
    model = registered(loaded, trained=True)
    weight = model.text.register_embeddings.weight
    weight[...] = weight[...] + jax.random.normal(jax.random.key(2), weight.shape)
    vlm_jax.save(model, tmp_path)
    loaded[1].save_pretrained(tmp_path)
    again, processor = vlm_jax.load(tmp_path)
    assert again.config.text.registers == model.config.text.registers
    batch = encode(examples, processor, again.config)
    np.testing.assert_array_equal(logits_of(again, batch), logits_of(model, batch))
    plain = logits_of(registered(loaded), batch)
    assert np.abs(logits_of(again, batch) - plain).max() > 1e-3  # their embeddings are read

    def refused(match, content):
        if content is None:
            (tmp_path / "registers.json").unlink()
        else:
            (tmp_path / "registers.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=match):
            vlm_jax.load(tmp_path)

    saved = json.loads((tmp_path / "registers.json").read_text())
    refused("trained with", {**saved, "mask": "mitre"})
    refused("trained with", {**saved, "count": 3})
    refused("belong to another model", {**saved, "token_id": 10**6})
    refused("unknown mask 'regster'; did you mean 'register'", {**saved, "mask": "regster"})
    refused("must have count and token_id", {"count": 3})
    refused("mask and positions must be text", {**saved, "mask": ["register"]})
    refused("registers.json is missing", None)
    vlm_jax.save(loaded[0], tmp_path)  # a model without registers replaces it whole
    assert not (tmp_path / "registers.json").exists()
    vlm_jax.load(tmp_path)


@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True, scope="module")
def test_other_commands_know_a_model_with_registers(loaded, examples, tmp_path):
    """Its Orbax folder, its description, its text-only backbone and its plan."""
    model = registered(loaded, trained=True)
    vlm_jax.save(model, tmp_path / "hf")
    loaded[1].save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "orbax")
    again, processor = vlm_jax.load(tmp_path / "orbax")
    batch = encode(examples, processor, again.config)
    np.testing.assert_array_equal(logits_of(again, batch), logits_of(model, batch))
    (tmp_path / "orbax/registers.json").write_text(json.dumps({"count": 4, "token_id": 7, "trained": True}))
    with pytest.raises(UserError, match="trained with"):
        vlm_jax.load(tmp_path / "orbax")
    counts = parameter_counts(model.config)
    assert counts["total"] == parameter_counts(loaded[0].config)["total"] + 4 * 128
    assert describe_shapes(model.config)["registers"].startswith("4 behind every image with embeddings of their own")
    for a, b in zip(jax.tree.leaves(model.backbone()), jax.tree.leaves(loaded[0].backbone()), strict=True):
        np.testing.assert_array_equal(a, b)
    same = model.with_registers(model.config.text.registers).text.register_embeddings.weight[...]
    np.testing.assert_array_equal(same, model.text.register_embeddings.weight[...])


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True, scope="module")
def test_sweeps_share_no_part_of_a_block_of_registers(loaded, examples, monkeypatch):
    """Noise on the third register: under mitre the ones before it see it."""
    model = registered(loaded, mask="mitre")
    batch = encode(examples[:3], loaded[1], model.config)
    noisy = batch.inputs.register_index == 2
    noise = 20 * np.random.default_rng(0).standard_normal((*noisy.shape, 128), np.float32)

    def gap():
        runs = [
            causal_trace(model, batch.inputs, noisy, batch.spans["answer"], noise=noise, engine=engine)
            for engine in ("sweep", "naive")
        ]
        return np.abs(np.log(runs[0].p_corrupt) - np.log(runs[1].p_corrupt)).max()

    assert gap() < 1e-5
    monkeypatch.setattr(prefix, "PREFIX_BUCKET", 1)
    assert gap() < 1e-5
    monkeypatch.setattr(prefix, "outside_blocks", lambda block, start: start)
    assert gap() > 1e-3  # the control


@of_vision_models
def test_refused(loaded, examples):
    model, processor = loaded
    inputs = encode(examples, processor, model.config, with_answer=False).inputs
    with pytest.raises(UserError, match="it has no registers"):
        vlm_jax.generate(model, inputs, 2, drop_images=True)
    masked = registered(loaded)
    with pytest.raises(UserError, match="the prompts have no registers, but the model has some"):
        vlm_jax.generate(masked, inputs, 2)
    batch = encode(examples, processor, masked.config, with_answer=False)
    with pytest.raises(UserError, match="the prompts have registers, but the model has none"):
        model(batch.inputs)
    cut = AttentionKnockout.between(masked.depths["text"], "text", "register")
    with pytest.raises(UserError, match="AttentionKnockout acts on the attention"):
        vlm_jax.generate(masked, batch.inputs, 2, bind([cut], batch), drop_images=True)
    with pytest.raises(UserError, match=r"'2' has 2\d\d\d tokens, 2000 of them registers, but the model takes 512"):
        encode([dataclasses.replace(examples[0], id="2")], processor, registered(loaded, 2000).config)
    with pytest.raises(UserError, match="number of registers is 0: give at least 1"):
        Registers(0, 1)
    with pytest.raises(UserError, match="text-only model"):
        with_registers(model.backbone().config, Registers(4, 1))
    text = encode(examples[-1:], processor, masked.config, with_answer=False).inputs
    np.testing.assert_array_equal(
        vlm_jax.generate(masked, text, 3, drop_images=True), vlm_jax.generate(model, text, 3)
    )  # without an image there are no registers, and nothing to drop


@pytest.mark.parametrize("folder", ["llava"], indirect=True, scope="module")
def test_kernels_refuse(loaded):
    config = dataclasses.replace(loaded[0].config, text=dataclasses.replace(loaded[0].config.text, attention="splash"))
    with pytest.raises(UserError, match="registers that hide images"):
        with_registers(config, Registers(4, 1))
    with_registers(config, Registers(4, 1, "none"))
