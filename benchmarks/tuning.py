"""How much faster a whole decoder and editors train here than with transformers and torch, on the same weights.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/tuning.py --json runs/tuning_speed.json

Both sides train the same arrays of a random Qwen3 text model on the same tokens, with gradient checkpointing and AdamW:
every weight of the decoder, or LoReFT editors of the first and the last tokens in every layer (P4's psi_P and psi_S).
The sides take turns, step by step. Times are medians of the steps after the first. torch keeps a projection orthonormal
by other parameters than this library does, so the editors' losses are equal only in the first step.
"""

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from lora import Args as Shape
from lora import machine, timed, tokens, torch_device, write_model

#: How many tokens an editor changes at either end.
_ENDS = 4


@dataclasses.dataclass(frozen=True)
class Args:
    """Time a training step of a whole decoder and of editors."""

    shape: tyro.conf.OmitArgPrefixes[Shape] = dataclasses.field(default_factory=Shape)
    trained: tuple[Literal["decoder", "editors"], ...] = ("decoder", "editors")
    """What is trained."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of weights and activations, on both sides."""
    rank: int = 4
    """Rank of the editors."""


def editors_of(model, rank: int) -> dict:
    """psi_P and psi_S in every layer."""
    import jax

    from interventions.editing.editors import init_editors

    made = init_editors(model, editors=("prefix", "suffix"), rank=rank, length=_ENDS, key=jax.random.key(0))
    return jax.tree.map(np.asarray, made)


def ours(args: Args, folder: Path, trained: str, dtype: str) -> Callable[[], float]:
    """A training step of this library, as train.tune and train.edit run it."""
    import jax
    import jax.numpy as jnp

    import vlm_jax
    from train.editors import EDITOR_LABELS, Edited, editor_label, editor_loss
    from train.objective import adamw, linear_decay, model_loss
    from train.step import Step, update
    from train.subsets import ByPart, partitioned, split
    from vlm_jax.prompts import Fitted

    model, _ = vlm_jax.load(folder / "model", dtype=dtype)
    ids, answer = tokens(args.shape), args.shape.answer
    index = np.tile(np.arange(ids.shape[1] - answer, ids.shape[1]), (len(ids), 1))
    inputs = vlm_jax.Inputs.from_hf(model.config, input_ids=ids)
    ends = {"prefix": np.arange(ids.shape[1]) < _ENDS, "suffix": np.arange(ids.shape[1]) >= ids.shape[1] - _ENDS}
    where = {name: np.tile(marked, (len(ids), 1)) for name, marked in ends.items()}
    data = Fitted(inputs.turned(), index, np.ones(index.shape, bool), where)
    if trained == "decoder":
        params, loss, label, labels = model, model_loss, ByPart(("text",)), ["text"]
    else:
        editors = jax.tree.map(jnp.asarray, editors_of(model, args.rank))
        params, loss, label = Edited.of(model, editors), editor_loss, editor_label
        labels = [EDITOR_LABELS[name] for name in editors]
    program = Step(loss, partitioned(dict.fromkeys(labels, adamw(linear_decay(2e-5, 1000))), label))
    arrays, rest = split(params, label)
    held = [program.begin(arrays)]
    data = jax.tree.map(lambda a: jnp.asarray(a)[None], data)

    def step() -> float:
        held[0], metrics = update(held[0], rest, data, jax.random.key(0), step=program)
        return float(metrics["loss"])

    return step


def theirs(args: Args, folder: Path, trained: str, dtype: str) -> Callable[[], float]:
    """The same in torch: transformers' model, its gradient checkpointing, torch's AdamW; editors as forward hooks."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).to(torch_device())
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    ids = torch.tensor(tokens(args.shape), device=torch_device())
    labels = torch.full_like(ids, -100)
    labels[:, -args.shape.answer :] = ids[:, -args.shape.answer :]
    if trained == "editors":
        model.requires_grad_(False)
        parameters = _hooked(args, model, folder)
    else:
        parameters = list(model.parameters())
    model.train()
    optimiser = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 1000)

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _hooked(args: Args, model, folder: Path) -> list:
    """Editors of this library's first values as forward hooks; their parameters."""
    import torch
    from torch.nn.utils.parametrizations import orthogonal

    import vlm_jax

    editors = editors_of(vlm_jax.load(folder / "model", dtype="float32")[0], args.rank)
    parameters: list = []
    for number, layer in enumerate(model.model.layers):
        for name, tokens_of in (("prefix", slice(0, _ENDS)), ("suffix", slice(-_ENDS, None))):
            u, w, b = (torch.tensor(array[number]) for array in editors[name].weights["text.resid_post"])
            rotate, source = torch.nn.Linear(*u.shape, bias=False), torch.nn.Linear(*u.shape)
            rotate.weight.data, source.weight.data, source.bias.data = u.T.clone(), w.T.clone(), b
            orthogonal(rotate)
            # In float32, because the parametrisation has no bfloat16.
            parts = torch.nn.ModuleList([rotate, source]).to(torch_device())
            parameters += parts.parameters()

            def hook(module, inputs, out, rotate=rotate, source=source, tokens_of=tokens_of):
                h = out[:, tokens_of].float()
                edited = (h + (source(h) - rotate(h)) @ rotate.weight).to(out.dtype)
                parts = [edited, out[:, _ENDS:]] if tokens_of.start == 0 else [out[:, :-_ENDS], edited]
                return torch.cat(parts, 1)

            layer.register_forward_hook(hook)
    return parameters


def main(args: Args) -> None:
    print(machine())
    results: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(args.shape, folder)
        for trained in args.trained:
            sides = {
                f"{side.__name__}, {dtype}": side(args, folder, trained, dtype)
                for dtype in args.dtypes
                for side in (ours, theirs)
            }
            rows: dict = {name: {"seconds": [], "losses": []} for name in sides}
            for turn in range(args.shape.repeats + 1):
                for name, step in sides.items():
                    seconds, _, loss = timed(step)
                    rows[name]["losses"].append(loss)
                    if turn:
                        rows[name]["seconds"].append(seconds)
                    print(f"{trained}, turn {turn}, {name}: {seconds:.2f} s, loss {loss:.5f}", flush=True)
            results[trained] = rows
    print("| trained | precision | here (s) | torch (s) | torch / here | losses differ by |\n|---|---|---|---|---|---|")
    for trained, rows in results.items():
        for dtype in args.dtypes:
            one, other = rows[f"ours, {dtype}"], rows[f"theirs, {dtype}"]
            here, there = statistics.median(one["seconds"]), statistics.median(other["seconds"])
            gap = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
            print(f"| {trained} | {dtype} | {here:.2f} | {there:.2f} | {there / here:.2f} | {gap:.1e} |")
    if args.shape.json is not None:
        args.shape.json.parent.mkdir(parents=True, exist_ok=True)
        args.shape.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
