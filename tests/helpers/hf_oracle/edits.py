"""Interventions as hooks on transformers' models."""

import sys
from contextlib import contextmanager

import torch


def text_layers(model):
    return getattr(model.model, "language_model", model.model).layers


def writer(layer, module):
    """The torch module whose output the residual stream gets from "attn" or "mlp": Gemma's second norm where it is."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_attention_layernorm if module == "attn" else layer.post_feedforward_layernorm
    return layer.self_attn if module == "attn" else layer.mlp


def reader(model, layer):
    """The torch module whose input is what a layer leaves in the residual stream, DeepStack's addition included."""
    layers = text_layers(model)
    norm = getattr(model.model, "language_model", model.model).norm
    return layers[layer + 1] if layer + 1 < len(layers) else norm


@contextmanager
def edited(*edits):
    """Runs with edits ``(module, "input" or "output", function of the hidden states)`` in place."""

    def on_output(function):
        def hook(_, __, out):
            return function(out) if isinstance(out, torch.Tensor) else (function(out[0]), *out[1:])

        return hook

    def on_input(function):
        def hook(_, args, kwargs):
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        return hook

    handles = [
        module.register_forward_hook(on_output(function))
        if side == "output"
        else module.register_forward_pre_hook(on_input(function), with_kwargs=True)
        for module, side, function in edits
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_edited(edits):
    """Runs with other attention probabilities: ``edits`` maps attention modules to functions of their scores and of
    the mask that is added to these, both ``(B, H, S, keys)``."""
    files = {sys.modules[type(module).__module__] for module in edits}
    eager = {file: file.eager_attention_forward for file in files}

    def edit(file):
        def forward(module, query, key, value, attention_mask, *args, **kwargs):
            if module not in edits:
                return eager[file](module, query, key, value, attention_mask, *args, **kwargs)
            assert kwargs.get("softcap") is None
            repeats = query.shape[1] // key.shape[1]
            scores = query @ key.repeat_interleave(repeats, 1).mT * kwargs["scaling"]
            added = torch.zeros(()) if attention_mask is None else attention_mask[..., : scores.shape[-1]]
            probs = edits[module](scores, added)
            return (probs @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous(), probs

        return forward

    for file in files:
        file.eager_attention_forward = edit(file)
    try:
        yield
    finally:
        for file in files:
            file.eager_attention_forward = eager[file]
