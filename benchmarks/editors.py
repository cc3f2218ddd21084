"""What P4's editors cost: a training step of editors against LoRA's, and generation with and without editors.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/editors.py --json runs/editors_speed.json

All sides take turns in one process, so that other work on the machine slows all alike. Times are medians of the turns
after the first. "LoRA, decoder" is trained as train.lora does it: the tower and the embeddings of each example were run
before, because no adapter changes them. The others run the whole model in every step.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from lora import machine

import vlm_jax
from interventions import bind
from interventions.editing.editors import editor_parameters
from interventions.editing.options import EditorOptions
from interventions.modules import module_names
from interventions.placement.adapters import init_lora, init_lora_on
from train import trunk
from train.adapter import ADAPTER_LABELS, adapter_label
from train.editors import EDITOR_LABELS, Edited, edited_tokens, editor_label, editor_loss
from train.objective import adamw, linear_decay
from train.step import Step, update
from train.subsets import partitioned, split
from vlm_jax import Model
from vlm_jax.data import load_task
from vlm_jax.prompts import Batch, Fitted, encode, positions
from vlm_jax.sites import TEXT_LINEARS, VISUAL_LINEARS


@dataclasses.dataclass(frozen=True)
class Args:
    """Time training steps of editors and LoRA, and generation with and without editors."""

    model: str = "mini-llava"
    """The model."""
    task: str = "mini-textvqa"
    """The task whose prompts are used."""
    batch: int = 16
    """Prompts in a step, and prompts that are answered together."""
    r: int = 64
    """Rank of LoRA."""
    new_tokens: int = 32
    """Tokens to generate for each prompt."""
    repeats: int = 9
    """Turns."""
    json: Path | None = None
    """Where to write the figures."""


def step_of(loss: Callable, label: Callable, labels: list[str], params, data) -> Callable[[], None]:
    """A training step of AdamW, and its program, compiled by the first call."""
    program = Step(loss, partitioned(dict.fromkeys(labels, adamw(linear_decay(1e-4, 1000))), label))
    trained, rest = split(params, label)
    held = [program.begin(trained)]
    data = jax.tree.map(lambda a: jnp.asarray(a)[None], data)

    def step() -> None:
        held[0], metrics = update(held[0], rest, data, jax.random.key(0), step=program)
        jax.block_until_ready(metrics)

    return step


def edited_step(model: Model, batch: Batch, editors: dict) -> Callable[[], None]:
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    data = Fitted(batch.inputs.turned(), index, valid, edited_tokens(editors)(batch))
    labels = [EDITOR_LABELS[name] for name in editors]
    return step_of(editor_loss, editor_label, labels, Edited.of(model, editors), data)


def lora_step(model: Model, batch: Batch, r: int) -> tuple[Callable[[], None], int]:
    """A step of train.lora on all modules, and the number of trained parameters."""
    names = module_names(model.config.text.num_hidden_layers)
    lora = init_lora(model, names, r=r, alpha=16.0, dropout=0.0, key=jax.random.key(0))
    data = trunk.trunk(model, batch, 0)
    params = trunk.prepared(model, lora, len(names), "some")
    labels = list(ADAPTER_LABELS)
    step = step_of(trunk.adapter_loss, adapter_label, labels, params, data)
    return step, editor_parameters({"lora": lora})["lora"]


def turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each side. The first turn, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(args: Args) -> None:
    vlm_jax.configure()
    print(machine())
    model, processor = vlm_jax.load(args.model)
    assert model.visual is not None, "editors of the vision tower need one"
    examples = load_task(args.task, split="train", limit=args.batch)
    batch = encode(examples, processor, model.config)
    key = jax.random.key(0)
    presets = {preset: EditorOptions(preset=preset).init(model, key) for preset in ("paper", "repo")}
    sites = [f"text.{name}" for names in TEXT_LINEARS.values() for name in names]
    tower = {f"visual.{name}" for names in VISUAL_LINEARS.values() for name in names} & model.visual.SITES
    both = {"lora": init_lora_on(model, [*sites, *sorted(tower)], r=args.r, alpha=16.0, key=key)}
    lora, lora_parameters = lora_step(model, batch, args.r)
    steps = {f"editors, {name}": edited_step(model, batch, editors) for name, editors in presets.items()}
    steps |= {"LoRA, decoder": lora, "LoRA, decoder and tower": edited_step(model, batch, both)}
    parameters = {f"editors, {name}": sum(editor_parameters(e).values()) for name, e in presets.items()}
    parameters |= {"LoRA, decoder": lora_parameters, "LoRA, decoder and tower": editor_parameters(both)["lora"]}
    training = turns(steps, args.repeats)
    print("| trained | parameters | seconds a step | times the paper's editors |\n|---|---|---|---|")
    for name, seconds in training.items():
        ratio = seconds / training["editors, paper"]
        print(f"| {name} | {parameters[name]:,} | {seconds:.3f} | {ratio:.2f} |")

    prompts = encode(examples, processor, model.config, with_answer=False)

    def answering(editors: dict) -> Callable[[], None]:
        acting = bind(tuple(editors.values()), prompts)
        return lambda: jax.block_until_ready(vlm_jax.generate(model, prompts.inputs, args.new_tokens, acting))

    generation = turns({"none": answering({}), **{n: answering(e) for n, e in presets.items()}}, args.repeats)
    print("\n| editors | tokens a second | of those without |\n|---|---|---|")
    for name, seconds in generation.items():
        rate = args.batch * args.new_tokens / seconds
        print(f"| {name} | {rate:,.0f} | {generation['none'] / seconds:.2f} |")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "parameters": parameters, "training": training, "generation": generation}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
