"""Run by test_processes.py as one of several processes: traces, answers and trainings of LoRA, of editors and of
dictionaries, kept in a run folder; and half of a training whose parameters are split over the mesh."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from eval.evaluation import answer
from interventions.editing.editors import init_editors
from interventions.flow.knockout import knocked_out_answers
from interventions.placement.adapters import init_lora
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_examples
from train import tune
from train.adapter import LoRAOptions
from train.dictionary_stage import Stage, StageOptions
from train.editors import TrainingOptions, train_editors
from train.kept import trained_interventions
from train.loop import LoopOptions, fit
from train.trunk import embedded_examples, train_lora
from vlm_jax import UserError, prompts
from vlm_jax.data import load_task
from vlm_jax.mesh.sharding import placed
from vlm_jax.registers import Registers
from vlm_jax.runs import processes
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.processes import everywhere, is_first

processes.LOST_SECONDS = int(os.environ.get("LOST_SECONDS", processes.LOST_SECONDS))
MODULES = ["L1-attn", "L3-mlp"]
ADAM = optax.adam(0.1)
HALF, WHOLE = 3, 6


@dataclasses.dataclass(frozen=True)
class Args(ModelOptions):
    """What the test compares."""

    epochs: int = 12
    seed: int = 0
    out: Path = Path("runs/processes")


def squares(params, batch, key):
    return jnp.mean((batch @ params["w"] - params["target"]) ** 2) + 0 * jax.random.uniform(key)


def label(path: str) -> str:
    return "freeze" if path == "target" else "train"


def numbers(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(1, 4, 8)).astype(np.float32)


def halved(folder: Path, steps: int) -> dict:
    """A training of ``w``, split over fsdp where there is a mesh."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {**placed({"w": np.ones((8, 4), np.float32)}, "embed"), "target": np.float32(2)}
    options = LoopOptions(save_every=HALF)
    transforms = {"train": ADAM}
    return fit(squares, start, numbers, transforms, label, steps=steps, folder=folder, options=options).params


def encoded() -> set[str]:
    """The ids of the examples that this process encodes from here on."""
    seen: set[str] = set()
    encode = prompts.encode

    def watched(examples, *args, **how):
        seen.update(example.id for example in examples)
        return encode(examples, *args, **how)

    prompts.encode = watched
    return seen


def refuse() -> None:
    if jax.process_index() == jax.process_count() - 1:
        raise UserError("the last one refuses")


@command
def main(args: Args) -> None:
    model, processor = args.load()
    run = Run.open(args.out, args, model.config, processor)
    examples = load_task("mini-docvqa", split="test", limit=10)
    tracing = TraceOptions(batch=4, seed=args.seed)
    traced = trace_examples(
        model,
        processor,
        examples,
        tracing,
        "docvqa",
        run.log("trace/samples.jsonl", Artifact("samples", "Traced samples")),
    )
    answers = answer(model, processor, examples, batch=4, log=run.log("answers.jsonl", Artifact("samples", "Answers")))
    cut = knocked_out_answers(model, processor, examples[:4], ["text:image"], modes=["post_softmax"], max_new_tokens=3)
    with pytest.raises(UserError, match="the last one refuses"):
        everywhere(refuse)
    train = load_task("mini-docvqa", split="train", limit=16)
    options = LoRAOptions(r=4, batch=4, accumulation=2, epochs=args.epochs, save_every=2, seed=args.seed)
    seen = encoded()
    data = embedded_examples(model, processor, train)
    run.path(f"encoded/{jax.process_index()}.json").write_text(json.dumps(sorted(seen)))
    lora = train_lora(model, MODULES, data, options, "lora", run.path("training/_").parent)
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    masked = model.with_registers(Registers(2, end))
    tune.tune(masked, processor, train, tune.Args(batch=8, epochs=1, seed=args.seed), run.path("tune/_").parent)
    begun = init_editors(model, layers=[1, 3], blocks=[1], key=jax.random.key(args.seed))
    training = TrainingOptions(batch=8, epochs=1)

    def edit(folder: Path) -> dict:
        return train_editors(model, processor, begun, train, training, seed=args.seed, folder=folder)

    kept = trained_interventions(run, "edit/editors.safetensors", "Editors", model, edit, training)
    edited = dict(zip(sorted(begun), kept, strict=True))
    start = init_lora(
        model, MODULES, r=options.r, alpha=options.alpha, dropout=options.dropout, key=jax.random.key(options.seed)
    )
    changes = {
        f"change of {site} {half}": after - before
        for site, pair in sorted(lora.weights.items())
        for half, after, before in zip("AB", pair, start.weights[site], strict=True)
    }
    for name, before in begun.items():
        for number, (a, b) in enumerate(zip(*map(jax.tree.leaves, (before, edited[name])), strict=True)):
            if np.abs(np.asarray(b) - np.asarray(a)).max() > 0:  # scales and slots are not trained
                changes[f"change of {name} {number}"] = np.asarray(b) - np.asarray(a)
    sparse = StageOptions(layers=(1, 3), latents=32, k=4, batch=32, store="float32", activation_batch=4)
    sparse = dataclasses.replace(sparse, seeds=(args.seed, args.seed + 2))
    stage = Stage(run, "sae/", sparse, "the model", model, processor, train[:8], examples[:4])
    for place, stored in stage.dictionaries().items():
        place = place._replace(seed=None if place.seed is None else place.seed - args.seed)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            changes[f"dictionary {place} {name}"] = np.asarray(getattr(stored.dictionary, name))
    explained = stage.measured(stage.dictionaries())["dictionaries"]
    changes["FVU"] = np.array([one["fvu"]["all"] for _, one in sorted(explained.items())])
    half = halved(run.folder / "half", HALF)["w"]
    if jax.process_count() > 1 and run.config["mesh"] and "fsdp" in run.config["mesh"]:
        assert not half.is_fully_replicated
    run.save_json(
        "answers.json", [*answers.texts, *(record["output"] for record in cut)], Artifact("metrics", "Answers")
    )
    arrays = {"ie": traced.ie, "te": traced.te, "sigma": traced.sigma, **changes}
    run.save_arrays("found.npz", arrays, Artifact("arrays", "Effects, and what training changed"))
    print("only the first process says this")
    print("done", is_first(), file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
