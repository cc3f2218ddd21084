"""Which words the residual stream stands for after every layer, and what every module writes towards the answer.

python -m interventions.lens --task mini-okvqa mini-docvqa --limit 48 --out runs/lens
"""

import itertools
from typing import Any

import tyro

from interventions.lens.artifacts import LENS, RESULTS, SAMPLES
from interventions.lens.lens import check_words
from interventions.lens.maps import first_picture, shown_layers, word_maps
from interventions.lens.options import Args
from interventions.lens.reading import Reading, read_examples
from interventions.lens.summary import records, summarise
from interventions.statistics import interval_text
from vlm_jax import Model
from vlm_jax.data import source
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.startup import load_tasks, start
from vlm_jax.runs.token_maps import TOKEN_MAPS, write_token_maps


def _report(task: str, results: dict[str, Any], first: dict[str, Any]) -> None:
    """Prints a line for each layer, with the words of the first sample."""
    lens, parts = results["lens"], results["attribution"]
    what = "logit(gold)" if first["foil"] is None else "logit(gold) - logit(foil)"
    print(f"{task}: {results['samples']} samples, {what} {interval_text(parts['logit'])}")
    foil = "" if first["foil"] is None else f", foil {first['foil']!r}"
    print(
        f"  layer       p(gold)  likeliest  median rank    attn     mlp  {first['id']} (gold {first['gold']!r}{foil})"
    )
    for point, words in enumerate(first["words"]):
        numbers = f"{lens['p_gold']['mean'][point]:7.3f}  {lens['is_likeliest']['mean'][point]:9.3f}"
        name, written = "embeddings", " " * 14
        if point:
            name = str(point - 1)
            written = "  ".join(f"{parts[module]['mean'][point - 1]:6.2f}" for module in ("attn", "mlp"))
        print(f"  {name:10s}  {numbers}  {lens['median_rank'][point]:11.0f}  {written}  {' '.join(map(repr, words))}")


def _check(args: Args, model: Model) -> None:
    check_words(model, max(args.top, 2))
    shown_layers(args.layers, model.config.text.num_hidden_layers)


@command
def main(args: Args) -> None:
    from interventions.figures import lens as figures
    from interventions.figures.base import save_figure

    tasks = load_tasks(args.task, split=args.split, limit=args.limit, options=args)
    data = {name: source(name, split=args.split, options=args) for name in args.task}
    run, model, processor = start(
        args,
        list(itertools.chain(*tasks.values())),
        data,
        check=lambda model: _check(args, model),
        ignored=("maps", "layers"),
    )
    model, acting = args.applied(run, model, args.model)
    layers = shown_layers(args.layers, model.config.text.num_hidden_layers)
    results, pictures = {}, []
    for task, examples in tasks.items():
        on = (model, processor, examples)
        options: dict[str, Any] = {"size": args.batch, "top": args.top, "against": args.against}
        reading = Reading(
            **run.once(
                f"{task}/lens.npz",
                lambda on=on, task=task, options=options: read_examples(
                    *on, name=task, interventions=acting, **options
                )._asdict(),
                Artifact("arrays", f"{task}: words and attributions at the token that writes the answer", LENS),
            )
        )
        lines = run.once(
            f"{task}/samples.jsonl",
            lambda reading=reading, on=on: records(reading, on[2], processor.tokenizer),
            Artifact("samples", f"{task}: which words the stream stands for after every layer", SAMPLES),
        )
        if args.maps:
            picture = run.once(
                f"{task}/token_maps",
                lambda on=on: word_maps(*on[:2], on[2][: args.maps], acting)._asdict(),
                Artifact("token_maps", f"{task}: which word every token stands for", TOKEN_MAPS),
                write=lambda path, made: write_token_maps(path, value="probability", **made),
                read=lambda path: first_picture(path, layers),
            )
            pictures += [picture] if picture is not None else []
        results[task] = summarise(reading, args.seed)
        _report(task, results[task], lines[0])
    shown = {part: {task: result[part] for task, result in results.items()} for part in ("lens", "attribution")}
    counts = {task: result["samples"] for task, result in results.items()}
    title = "The gold word after every layer (logit lens)"
    save_figure(run, "lens", figures.by_layer, title, tasks=shown["lens"], samples=counts)
    title = "What every module and head writes towards the gold word"
    save_figure(run, "attribution", figures.attribution, title, tasks=shown["attribution"], samples=counts)
    if pictures:
        save_figure(run, "words", figures.words, "Which words the tokens of a picture stand for", samples=pictures)
    run.save_json("results.json", results, Artifact("metrics", "Lens and attributions of every task", RESULTS))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
