"""The sides of ``peers.py``: one function each, as a user of the tool writes P0's grid.

A function gets transformers' model, a prompt, the noise ``(1, T, D)`` of its question, which tokens are the answer, and
how many cells to run. It returns the answer's probability in the corrupted run with one module's clean output, layer by
layer, attention before MLP.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch


def probability(logits, ids, gold):
    """The geometric mean probability of the answer's tokens."""
    at = gold[0].nonzero()[:, 0]
    logp = torch.log_softmax(logits[0, at - 1].float(), -1)
    return float(logp[torch.arange(len(at)), ids[0, at]].mean().exp())


def hooks(hf, prompt, noise, gold, cells):
    """With PyTorch's forward hooks."""
    text = hf.model.language_model
    modules = [module for layer in text.layers for module in (layer.self_attn, layer.mlp)]
    clean = {}

    def keep(module, args, out):
        clean[module] = out[0] if isinstance(out, tuple) else out

    handles = [module.register_forward_hook(keep) for module in modules]
    hf(**prompt)
    for handle in handles:
        handle.remove()
    text.embed_tokens.register_forward_hook(lambda module, args, out: out + noise)

    def patch(module, args, out):
        return (clean[module], *out[1:]) if isinstance(out, tuple) else clean[module]

    values = []
    for module in modules[:cells]:
        handle = module.register_forward_hook(patch)
        values.append(probability(hf(**prompt).logits, prompt["input_ids"], gold))
        handle.remove()
    return values


def nnsight(hf, prompt, noise, gold, cells):
    """With nnsight."""
    from nnsight import NNsight

    model = NNsight(hf)
    text = model.model.language_model
    with model.trace(**prompt):
        clean = [].save()
        for layer in text.layers:
            clean.append(layer.self_attn.output[0])
            clean.append(layer.mlp.output)
    values = []
    for cell in range(cells):
        layer = text.layers[cell // 2]
        with model.trace(**prompt):
            text.embed_tokens.output = text.embed_tokens.output + noise
            if cell % 2:
                layer.mlp.output = clean[cell]
            else:
                layer.self_attn.output = (clean[cell], *layer.self_attn.output[1:])
            logits = model.output.logits.save()
        values.append(probability(logits, prompt["input_ids"], gold))
    return values


def transformer_lens(hf, prompt, noise, gold, cells):
    """With TransformerLens' bridge."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(hf.name_or_path, hf_model=hf)
    ids, rest = prompt["input_ids"], {name: value for name, value in prompt.items() if name != "input_ids"}
    names = [f"blocks.{layer}.hook_{module}_out" for layer in range(bridge.cfg.n_layers) for module in ("attn", "mlp")]
    _, cache = bridge.run_with_cache(ids, names_filter=names, **rest)
    values = []
    for name in names[:cells]:
        edits = [
            ("hook_embed", lambda value, hook: value + noise),
            (name, lambda value, hook, clean=cache[name]: clean),
        ]
        logits = bridge.run_with_hooks(ids, fwd_hooks=edits, **rest)
        values.append(probability(logits, ids, gold))
    return values


#: Side -> its function. The package of a side has its name.
SIDES = {"hooks": hooks, "nnsight": nnsight, "transformer_lens": transformer_lens}


def forget_peak() -> None:
    """Begins to measure the peak of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The peak since then."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def main(side: str, folder: str, cells: str) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    arrays = dict(np.load(Path(folder) / "prompt.npz"))
    noise, gold = (torch.tensor(arrays.pop(name)) for name in ("noise", "gold"))
    prompt = {name: torch.tensor(value) for name, value in arrays.items()}
    seconds, values = [], []
    for count in (0, int(cells)):  # what comes before the cells, then all
        hf = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        forget_peak()
        begun = time.perf_counter()
        with torch.no_grad():
            values = SIDES[side](hf, prompt, noise, gold, count)
        seconds.append(time.perf_counter() - begun)
    spent = {"before_seconds": seconds[0], "cells_seconds": seconds[1] - seconds[0]}
    package = {"hooks": "transformers"}.get(side, side)
    name = f"{package} {importlib.metadata.version(package)}" + (" + hooks" if side == "hooks" else "")
    print(json.dumps({"name": name, **spent, "peak_gib": peak_gib(), "cells": values}))


if __name__ == "__main__":
    main(*sys.argv[1:])
