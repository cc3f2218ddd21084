"""A tiny model of every family in transformers and in vlm_jax, and one program that runs all kinds.

Kinds that a test does not set do nothing. So all tests of a family run one program, which shows that layers, heads,
tokens and strengths are values: changing them compiles nothing.
"""

from contextlib import ExitStack

import jax
import numpy as np
import torch
from hf_oracle import (
    attention_edited,
    edited,
    make_batch,
    part_masks,
    positions,
    tensors,
    text_layers,
    tiny_config,
    tiny_model,
)

import vlm_jax
from interventions import (
    GROUPS,
    Ablation,
    Add,
    AttentionKnockout,
    Dictionary,
    Gate,
    HeadGate,
    Latents,
    LoReFT,
    Patch,
    ProjectOut,
    Replace,
    UniformAttention,
    bind,
)
from vlm_jax.prompts import Batch

TOLERANCE, CAUGHT, EXACT = 1e-4, 1e-3, 1e-5
LAYERS, HEADS, WIDTH = 4, 4, 64
GRIDS = {
    "qwen3_vl": ((4, 6), (2, 10)),
    "qwen2_5_vl": ((4, 6), (2, 10)),
    "gemma3": ((8, 8),) * 2,
    "llava": ((6, 6),) * 2,
}
FAMILIES = tuple(GRIDS)
# Both kinds of Gemma's layers.
TEXT = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}}
MODULES = [("attn",), ("mlp",), ("attn", "mlp")]


def rows_of(family):
    """One image, two images, and none; the last two parts are the question and the answer."""
    first, second = GRIDS[family]
    return [[9, first, 3, 6, 3], [5, first, 2, second, 4, 5, 2], [12, 4, 2]]


def spans_of(masks):
    """The spans of an encoded batch; these prompts have no token that ends the answer's turn."""
    return {name: masks[name] for name in ("image", "image_end", "question", "answer")} | {
        "end": np.zeros_like(masks["image"])
    }


def dictionary(rng, members=2, latents=96, k=7):
    """Random TopK dictionaries; their decoders have rows of norm 1."""
    decoder = rng.standard_normal((members, latents, WIDTH), np.float32)
    decoder /= np.linalg.norm(decoder, axis=-1, keepdims=True)
    encoder = decoder.swapaxes(1, 2) + 0.1 * rng.standard_normal((members, WIDTH, latents), np.float32)
    biases = (0.1 * rng.standard_normal((members, size), np.float32) for size in (latents, WIDTH))
    b_enc, b_dec = biases
    return Dictionary(encoder, b_enc, decoder, b_dec, architecture="topk", k=k)


class Case:
    """A tiny model of a family in transformers and in vlm_jax, a ragged batch, and one program that runs every kind."""

    def __init__(self, family, folder, layers=LAYERS):
        text = {"num_hidden_layers": layers} | (TEXT.get(family, {}) if layers == LAYERS else {})
        self.config = tiny_config(family, text=text)
        self.oracle = tiny_model(self.config)
        self.oracle.save_pretrained(folder)
        self.model, _ = vlm_jax.load(folder)
        self.rows = rows_of(family)
        self.batches = {side: make_batch(self.rows, side, 0, self.config) for side in ("left", "right")}
        self.masks = {side: part_masks(self.config, self.rows, side) for side in ("left", "right")}
        self.real = {side: batch["attention_mask"] == 1 for side, batch in self.batches.items()}
        self.inputs = {side: vlm_jax.Inputs.from_hf(self.model.config, **batch) for side, batch in self.batches.items()}
        self.traced = 0
        rng = np.random.default_rng(7)
        batch, length = self.real["left"].shape
        # As many tokens before the images as behind them, and in every row; padding too, which must not matter.
        self.some = rng.random((batch, length)) < 0.4
        self.donor = {
            f"text.{module}_out": rng.standard_normal((layers, batch, length, WIDTH), np.float32)
            for module in ("attn", "mlp")
        }
        head_dim = self.model.config.text.head_dim
        self.head_donor = rng.standard_normal((layers, batch, length, HEADS, head_dim), np.float32)
        self.vectors = rng.standard_normal((2, WIDTH), np.float32)
        self.directions = rng.standard_normal((2, 3, WIDTH), np.float32)
        self.loreft = tuple(0.3 * rng.standard_normal(shape, np.float32) for shape in ((2, 64, 3), (2, 64, 3), (2, 3)))
        self.dictionary = dictionary(rng)
        null, ones = nothing(layers), np.ones(layers, np.float32)
        keep = np.ones((layers, len(GROUPS), len(GROUPS)), np.float32)
        everywhere = np.ones((batch, length), bool)
        self.neutral = {
            "patch": Patch(self.donor, dict.fromkeys(self.donor, null), everywhere),
            "heads": Patch(
                {"text.head_out": self.head_donor}, {"text.head_out": null}, everywhere, np.ones(HEADS, bool)
            ),
            "ablation": Ablation(
                {site: np.zeros((1, len(GROUPS), WIDTH), np.float32) for site in self.donor},
                dict.fromkeys(self.donor, null),
                np.ones(len(GROUPS), bool),
                np.zeros((batch, length), np.int32),
                where=everywhere,
            ),
            "gate": Gate(dict.fromkeys(self.donor, ones), where=everywhere),
            "head_gate": HeadGate(np.ones((layers, HEADS), np.float32)),
            "uniform": UniformAttention(np.zeros(layers, np.float32)),
            "add": Add(self.vectors, "text.resid_post", null, where=everywhere),
            "replace": Replace(self.vectors, "text.resid_post", null, where=everywhere),
            "project": ProjectOut.of(self.directions, {"text.resid_post": null}, where=everywhere),
            "loreft": LoReFT({"text.resid_post": self.loreft}, {"text.resid_post": null}, where=everywhere),
            "latents": Latents.of(self.dictionary, {"text.resid_post": null}, where=everywhere),
            **{mode: self.bound(AttentionKnockout(keep, mode=mode)) for mode in ("post_softmax", "pre_softmax")},
        }
        self.program = jax.jit(self._program)

    def _program(self, model, inputs, interventions):
        self.traced += 1
        return model(inputs, interventions).logits

    def bound(self, intervention, side="left"):
        """Bound to the batch."""
        return bind((intervention,), Batch(self.inputs[side], spans_of(self.masks[side]), 2))[0]

    def logits(self, side="left", model=None, **set_):
        """Logits of the real tokens ``(tokens, V)``, in the order of the rows, with the named kinds as given."""
        assert set_.keys() <= self.neutral.keys()
        interventions = tuple((self.neutral | set_).values())
        if side == "right":
            interventions = tuple(self.moved(i) for i in interventions)
        return np.asarray(self.program(model or self.model, self.inputs[side], interventions))[self.real[side]]

    def moved(self, intervention):
        """An intervention on the left-padded batch as it must be for the right-padded one."""
        changes = {}
        if getattr(intervention, "where", None) is not None:
            changes["where"] = self.to_right(intervention.where)
        if isinstance(intervention, Ablation):
            changes["labels"] = self.to_right(intervention.labels)
        if isinstance(intervention, AttentionKnockout):
            changes["groups"] = self.bound(intervention, "right").groups
        if isinstance(intervention, Patch):
            changes["donor"] = {
                site: np.stack([self.to_right(layer) for layer in values])
                for site, values in intervention.donor.items()
            }
        return intervention.replace(**changes)

    def to_right(self, array):
        out = np.zeros_like(array)
        out[self.real["right"]] = np.asarray(array)[self.real["left"]]
        return out

    def wanted(self, *edits, attention=None):
        """transformers' logits of the real tokens, under hooks."""
        batch = self.batches["left"]
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(edited(*edits))
            if attention:
                stack.enter_context(attention_edited(attention))
            logits = self.oracle(**tensors(batch), **positions(self.config, batch), use_cache=False).logits
        return logits.numpy()[self.real["left"]]

    @property
    def layers(self):
        return text_layers(self.oracle)


def nothing(layers=LAYERS, slots=99):
    return np.full(layers, slots, np.int32)


def slot(layer, number=0, layers=LAYERS):
    """A slot table that uses slot ``number`` in one layer and nothing elsewhere."""
    table = nothing(layers)
    table[layer] = number
    return table


def only(layer, on, off, layers=LAYERS):
    return np.where(np.arange(layers) == layer, on, off).astype(np.float32)


def error(got, want):
    """The one judge: the largest absolute difference."""
    assert got.shape == want.shape and np.isfinite(got).all() and np.isfinite(want).all()
    return float(np.abs(got - want).max())


def mixed(where, new, old):
    """torch: ``new`` at the tokens ``where (B, T)``, ``old`` elsewhere."""
    return torch.where(torch.from_numpy(where)[(...,) + (None,) * (old.ndim - 2)], new, old)


def one_sentence(error):
    text = str(error)
    return "\n" not in text and ". " not in text and not text.endswith(".")


def head_edit(case, function):
    """An edit of what the heads read ``(B, T, H, d)``."""

    def edit(x):
        return function(x.unflatten(-1, (HEADS, -1))).flatten(-2)

    return lambda layer: (case.layers[layer].self_attn.o_proj, "input", edit)


def knocked(case, keys=("image",)):
    """Which query may not read which key ``(B, 1, T, T)``: the tokens behind the first image, and the images."""
    masks = case.masks["left"]
    read = np.logical_or.reduce([masks[name] for name in keys])
    return torch.from_numpy(masks["behind"][:, :, None] & read[:, None, :])[:, None]


def post_softmax(case, keep=0.0, **how):
    """P1, equations 3 and 4: the probabilities times the mask."""
    factor = torch.where(knocked(case, **how), keep, 1.0)
    return lambda scores, mask: (scores + mask).softmax(-1) * factor


def pre_softmax(case, **how):
    """Geva et al.: the scores are minus infinity."""
    away = knocked(case, **how)
    return lambda scores, mask: (scores + mask).masked_fill(away, torch.finfo(scores.dtype).min).softmax(-1)


KNOCK_OUTS = {"post_softmax": post_softmax, "pre_softmax": pre_softmax}


def without_weights(model, layer, names):
    """The model with the kernels and biases of some linears of a layer zeroed."""
    zeroed = []

    def zero(path, leaf):
        path = jax.tree_util.keystr(path)
        if "text" in path and any(name in path for name in names):
            zeroed.append(path)
            return leaf.at[layer].set(0)
        return leaf

    model = jax.tree_util.tree_map_with_path(zero, model)
    assert len(zeroed) >= len(names)
    return model


def between(mode, layers=(1,), query="text", key="image", **how):
    return AttentionKnockout.between(LAYERS, query, key, layers, mode=mode, **how)
