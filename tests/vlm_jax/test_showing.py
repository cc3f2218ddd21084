"""What a terminal and a notebook show of models, batches, results and interventions: fields and shapes, no numbers."""

import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.struct import dataclass

import vlm_jax
from interventions import AttentionKnockout, Gate, causal_trace
from vlm_jax.data import load_task
from vlm_jax.model import Output
from vlm_jax.prompts import encode
from vlm_jax.showing import described, shown

EVIL = "</td><script>alert(1)</script>"


@pytest.fixture(scope="module")
def loaded():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def batch(loaded):
    model, processor = loaded
    return encode(load_task("mini-okvqa", split="test", limit=2), processor, model.config)


class Balanced(html.parser.HTMLParser):
    """Fails at markup that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.said = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def test_a_model(loaded):
    model, _ = loaded
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    name = "Model(qwen3_vl, 8 layers of width 128, vision tower of 4 blocks of width 96"
    assert str(model) == repr(model) == f"{name}, {size / 1e6:,.1f} M parameters)"
    said = Balanced(model._repr_html_()).said
    embeddings = sum(leaf.size for leaf in jax.tree.leaves(model.text.embed_tokens))
    assert repr(model) in said and f"{embeddings:,} parameters" in said and "float32" in said
    assert "visual.blocks" in said and len(said) < 2000


def test_batches_and_outputs(batch):
    rows, length = batch.inputs.input_ids.shape
    text = repr(batch)
    assert f"input_ids=int32[{rows},{length}]" in text and f"question: bool[{rows},{length}]" in text
    assert "register_index" not in text and "images=Images(pixel_values=float32[" in text and len(text) < 1500
    output = Output(jnp.zeros((2, 3, 4)), {"text.resid_post": jnp.zeros((8, 2, 3, 4))})
    assert repr(output) == "Output(logits=float32[2,3,4], taps={text.resid_post: float32[8,2,3,4]})"
    said = Balanced(output._repr_html_()).said
    assert "text.resid_post" in said and "float32[8,2,3,4]" in said
    jax.eval_shape(lambda x: jnp.asarray(len(repr(Output(x, {})))), jnp.zeros(3))  # while it is traced, too


def test_interventions():
    cut = AttentionKnockout.between(8, "text", "image", mode="pre_softmax")
    assert repr(cut).startswith("AttentionKnockout(text.attn_scores; mode=pre_softmax") and len(repr(cut)) < 200
    assert "float32[8," in Balanced(cut._repr_html_()).said
    assert "text.attn_out L1" in repr(Gate.cut(2, [1]))


def test_a_trace_shows_its_map(loaded, batch):
    model, _ = loaded
    trace = causal_trace(model, batch.inputs, batch.spans["question"], batch.spans["answer"])
    page = Balanced(trace._repr_html_())
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["alt"] == "restoration rate (RR), mean of 2 samples"
    assert picture["src"].startswith("data:image/png;base64,iVBOR") and "ie" in page.said
    assert "rr=float32[2,8,2]" in repr(trace)


def test_texts_cannot_become_markup():
    @shown
    @dataclass
    class Named:
        name: str
        more: dict

    page = Balanced(Named(EVIL, {EVIL: 1})._repr_html_())
    assert not [tag for tag, _ in page.tags if tag == "script"] and page.said.count("alert(1)") == 2


@pytest.mark.parametrize(
    "value, text",
    [
        (np.float32([0.12345, 2]), "float32[2] [0.1235, 2.    ]"),
        (np.zeros((3, 4), np.int8), "int8[3,4]"),
        (jnp.int32(7), "int32[] 7"),
        (jax.random.key(0), "key<fry>[]"),
        (jax.ShapeDtypeStruct((2,), jnp.bfloat16), "bfloat16[2]"),
        (dict.fromkeys(range(10), 0), "{0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0, ... 2 more}"),
        ((1, [2.5, "a"]), "(1, (2.5, 'a'))"),
    ],
)  # fmt: skip
def test_values(value, text):
    assert described(value) == text
