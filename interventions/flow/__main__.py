"""P1: what the text reads from the image, and how answers change when it cannot (section 3, equations 1-4).

python -m interventions.flow --task mini-okvqa mini-docvqa --limit 48 --out runs/flow
"""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from interventions.flow.artifacts import ATTENTION, RESULTS, SAMPLES, WINDOWS
from interventions.flow.knockout import (
    EDGES,
    WINDOW_EDGES,
    Effect,
    edge,
    knocked_out_answers,
    window_effects,
    window_layers,
)
from interventions.flow.maps import attention_maps
from interventions.flow.shares import Reading, read_examples
from interventions.flow.summary import summarise_answers, summarise_effect, summarise_reading, summarise_received
from interventions.options import StateOptions
from interventions.statistics import interval_text
from vlm_jax.config import Config
from vlm_jax.data import Example, source
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, Range
from vlm_jax.runs.startup import load_tasks, start
from vlm_jax.runs.token_maps import TOKEN_MAPS, write_token_maps


@dataclasses.dataclass(frozen=True)
class Args(StateOptions, DataOptions, ModelOptions):
    """Measure how visual information flows to text (P1): the attention to the image, answers with parts of the
    attention cut, and the layers in which cuts matter."""

    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ("mini-okvqa", "mini-docvqa")
    """Tasks: names, families (knowledge, perception, p0-knowledge ...), JSONL files or folders."""
    split: str = "trace"
    """Which split of a named task to use: trace, train, eval or test."""
    limit: Annotated[int, Range(least=1)] = 48
    """How many samples of each task to use."""
    edges: tuple[str, ...] | None = None
    """Which attention is cut while answers are generated, as QUERIES:KEYS. Both are token groups, several joined by +.
    By default text:image and, if the model has an end-of-image token, text:image_end and text:image+image_end; in a
    model with registers, text:register and text:image+register instead, or text:register alone if they hide the image
    from the text."""
    modes: tuple[Literal["post_softmax", "pre_softmax", "random_mass", "value_norm"], ...] = (
        "post_softmax",
        "pre_softmax",
        "random_mass",
        "value_norm",
    )
    """How attention is cut. post_softmax: probabilities set to 0, the others unchanged (P1's equations 3 and 4);
    pre_softmax: scores masked, so that the other probabilities sum to 1 (Geva et al. 2023); random_mass and value_norm:
    controls. Windows use the first mode."""
    answers: Literal["all", "windows"] = "all"
    """Generate answers with edges cut in all layers at once, or also in every window of layers."""
    window: Annotated[int, Range(least=1)] = 3
    """How many neighbouring layers a window has."""
    window_edges: tuple[str, ...] | None = None
    """Which attention is cut in windows, to measure the probability of the gold answer. "writers" are the tokens whose
    outputs are the answer. By default text:image, question:image, writers:image and text:question; if registers hide
    the image from the text, the same with the registers."""
    batch: Annotated[int, BATCH] = 16
    """Samples that are run at once. Larger batches are faster and need more memory."""
    max_new_tokens: Annotated[int, Range(least=1)] = 12
    """Longest answer, in tokens."""
    maps: Annotated[int, Range(least=0)] = 2
    """Of how many samples of each task to keep what every token attends to, for the result page (eval.page)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the bootstrap intervals and of random_mass."""
    out: Path = Path("runs/flow")
    """Run folder: results.json, four figures, and per task attention.npz, samples.jsonl, windows.npz and
    token_maps/."""


def check_images(examples: Iterable[Example]) -> None:
    """Refuses an example that has no image, because there is no attention to measure."""
    for example in examples:
        if not example.images:
            raise UserError(f"example {example.id!r} has no image for its text to read: leave it out")


_NO_END = "this model has no end-of-image token (text follows its image tokens directly)"


def edges_of(args: Args, config: Config) -> tuple[list[str], list[str]]:
    """The edges that are cut while answers are generated, and those that are cut in windows. Defaults are those that
    this model has.

    Raises:
        UserError: for an edge that is unknown, named twice or not possible in this model.
    """
    registers = config.text.registers
    lacking = {"register": "this model has no registers", "image_end": _NO_END}
    if registers is not None:
        lacking = {"image_end": "this model has registers in place of an end-of-image token"}
    elif FAMILIES[config.family].chat.image_end is not None:
        del lacking["image_end"]
    edges, windows = list(args.edges or ()), list(args.window_edges or ())
    hidden = registers is not None and registers.hides_images
    if args.edges is None and hidden:
        edges = ["text:register"]
    elif args.edges is None:
        edges = [name.replace("image_end", "register") if registers is not None else name for name in EDGES]
        edges = [name for name in edges if not any(group in name for group in lacking)]
        if "image_end" in lacking and registers is None:
            print(f"note: {_NO_END}, so nothing is cut from it")
    if args.window_edges is None:
        windows = [name.replace("image", "register") if hidden else name for name in WINDOW_EDGES]
    for name in (*edges, *windows):
        edge(name)
        if absent := [group for group in lacking if group in name]:
            raise UserError(f"{lacking[absent[0]]}: drop {name}")
    for names, option in zip((edges, windows, args.modes), ("edges", "window-edges", "modes"), strict=True):
        if not names or len(set(names)) < len(names):
            raise UserError(f"--{option} is {' '.join(names) or 'empty'}: name at least one, and none twice")
    return edges, windows


def _report(task: str, results: dict) -> None:
    """Prints what was measured on a task: attention layer by layer, then the answers without each edge."""
    attention = results["attention"]
    names = [
        name
        for name in ("to_image", "to_image_end", "to_register", "ratio", "tokens_for_80", "tokens_for_90")
        if name in attention
    ]
    print(f"{task}: {results['samples']} samples\n  layer  " + "  ".join(f"{name:>13s}" for name in names))
    for layer in range(len(attention["to_image"]["mean"])):
        print(f"  {layer:<5d}  " + "  ".join(f"{attention[name]['mean'][layer]:13.3f}" for name in names))
    for part in (part for part in results["answers"] if part["layers"] is None):
        failures = ", ".join(f"{count} {why}" for why, count in part["failures"].items() if count)
        cut = f"without {part['edge'] or 'nothing':20s}  {part['mode'] or '':12s}"
        print(f"  {cut}  right {interval_text(part['accuracy'])}  {failures}".rstrip())


@command
def main(args: Args) -> None:
    from interventions.figures import flow as figures
    from interventions.figures.base import save_figure

    tasks = load_tasks(args.task, split=args.split, limit=args.limit, options=args)
    examples = list(itertools.chain(*tasks.values()))
    check_images(examples)
    data = {name: source(name, split=args.split, options=args) for name in args.task}
    run, model, processor = start(args, examples, data, ignored=("maps",))
    edges, window_edges = edges_of(args, model.config)
    in_windows = window_layers(model.config.text.num_hidden_layers, args.window)
    model, acting = args.applied(run, model, args.model)
    batching: dict[str, Any] = {"size": args.batch, "seed": args.seed, "interventions": acting}
    to_generate: dict[str, Any] = batching | {
        "modes": args.modes,
        "layers": [None, *in_windows] if args.answers == "windows" else [None],
        "max_new_tokens": args.max_new_tokens,
    }
    readings, results = {}, {}
    for task, examples in tasks.items():
        on = (model, processor, examples)
        readings[task] = Reading(
            **run.once(
                f"{task}/attention.npz",
                lambda on=on, task=task: read_examples(*on, args.batch, task, interventions=acting)._asdict(),
                Artifact("arrays", f"{task}: what the text attends to", ATTENTION),
            )
        )
        records = run.once(
            f"{task}/samples.jsonl",
            lambda on=on, task=task: knocked_out_answers(*on, edges, name=task, **to_generate),
            Artifact("samples", f"{task}: answers under every knock-out", SAMPLES),
        )
        effect = Effect(
            **run.once(
                f"{task}/windows.npz",
                lambda on=on, task=task: window_effects(
                    *on, window_edges, args.window, mode=args.modes[0], name=task, **batching
                )._asdict(),
                Artifact("arrays", f"{task}: p(gold) with edges cut in windows of layers", WINDOWS),
            )
        )
        if args.maps:
            run.once(
                f"{task}/token_maps",
                lambda on=on: attention_maps(*on[:2], on[2][: args.maps], acting),
                Artifact("token_maps", f"{task}: what every token attends to", TOKEN_MAPS),
                write=lambda path, made: write_token_maps(path, made[0], value="attention probability", series=made[1]),
                read=lambda path: None,
            )
        results[task] = {
            "samples": len(examples),
            "attention": summarise_reading(readings[task], args.seed),
            "answers": summarise_answers(records),
            "windows": summarise_effect(effect, window_edges, args.seed),
        }
        _report(task, results[task])
    parts = {
        part: {task: result[part] for task, result in results.items()} for part in ("attention", "answers", "windows")
    }
    received = {task: summarise_received(reading) for task, reading in readings.items() if reading.of_image}
    for name, draw, title, shown in (
        ("attention", figures.attention, "Where the text's attention goes, by layer", parts["attention"]),
        ("cumulative", figures.cumulative, "How the image's attention is spread over its tokens", received),
        ("answers", figures.answers, "Accuracy with edges cut in all layers", parts["answers"]),
        ("windows", figures.windows, "Change of p(gold) with edges cut in windows of layers", parts["windows"]),
    ):
        if shown:
            save_figure(run, name, draw, title, tasks=shown)
    run.save_json("results.json", results, Artifact("metrics", "Attention, answers and effects of every task", RESULTS))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
