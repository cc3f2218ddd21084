"""Causal tracing of a task's examples (P0), batch by batch, into a run folder."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from interventions.engine.prefix import PREFIX_BUCKET
from interventions.engine.read import Gold, LogitDifference
from interventions.engine.sweep import sweep_runs
from interventions.kinds.groups import bind
from interventions.kinds.packed import digest
from interventions.modules import cell_names, module_names
from interventions.statistics import write_effects, write_rows
from interventions.trace.artifacts import CELLS, EFFECTS, SAMPLES, SUMMARY
from interventions.trace.corruption import CORRUPTIONS, Corrupter, counterpart, survey
from interventions.trace.options import TraceOptions
from interventions.trace.patches import Patches, Present
from interventions.trace.result import TaskTrace, bounds, by_module, by_position, sample_count, summarise
from interventions.trace.samples import check_lines, effects, line, predictions
from vlm_jax import Inputs, Model
from vlm_jax.acting import acting
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.config import Config
from vlm_jax.data import Example
from vlm_jax.data.metrics import LETTERS, normalise
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches, encode
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import apart, fetch, progress
from vlm_jax.sites import Intervention, Stage, stage


def trace_examples(
    model: Model,
    processor: Processor,
    examples: list[Example],
    options: TraceOptions,
    label: str,
    log: Log | None = None,
    *,
    interventions: Sequence[Intervention] = (),
    reference: Sequence[Example] | None = None,
) -> TaskTrace:
    """Traces every example.

    Args:
        log: the file of the samples' records. New ones are appended; those of an earlier session are read from it.
        interventions: those that act in every run, clean or corrupted; token groups are bound to every batch.
        reference: the samples whose means ``--patch mean`` takes; None: the traced ones.

    Raises:
        UserError: for options that the model or these samples do not allow, or if the corruption changes pictures and
            an intervention acts in the vision tower.
    """
    interventions = acting(interventions, model.depths)
    check_corruption(options, interventions)
    options.check(model.config.text.num_hidden_layers)
    examples = traced(model, processor, examples, options, interventions)
    log, ids = Log() if log is None else log, [example.id for example in examples]
    cells = cells_of(model.config, options)
    with apart(model, tuple(interventions)) as (team, model, interventions):
        team_rows = team.rows(len(examples))

        def groups() -> Iterator[tuple[list[int], Batch]]:
            team_examples = [examples[row] for row in team_rows]
            for rows, batch in batches(team_examples, processor, model.config, options.batch, align=PREFIX_BUCKET):
                yield [team_rows[row] for row in rows], batch

        present = Present(options.groups)
        task_survey = survey(model, present.noted(groups()))
        present.check()
        if CORRUPTIONS[options.corruption].visual and task_survey.mean_image is None:
            raise UserError(
                f"--corruption {options.corruption} needs images, and no sample has one: corrupt the question"
            )
        corrupt = Corrupter(model, processor, examples, task_survey, options)
        patches = Patches(model, processor, examples, options, reference, interventions)
        part = log.part(team, ids)
        check_lines(part.records, "samples.jsonl" if part.run is None else part.run.folder / part.name)
        with progress(total=len(team_rows), desc=f"trace {label}", unit="sample") as bar:
            for rows, batch in part.missing(groups(), ids):
                bar.update(len(part.records) - bar.n)
                of_batch = [examples[row] for row in rows]
                records = trace_batch(corrupt, rows, batch, interventions, patches)
                written: list[str | None] = [None] * len(rows)
                if log.run is not None:  # only readers of the file ask for it
                    written = predictions(model, processor, of_batch, options.batch, interventions)
                together = zip(records, of_batch, written, strict=True)
                part.append([line(record, example, cells, text) for record, example, text in together])
                bar.update(len(rows))
    log.join(part, ids, team)
    by_id = {record["id"]: record for record in log.records}
    kept = [by_id[example.id] for example in examples]
    columns = {name: np.array([record[name] for record in kept], float) for name in ("p_clean", "p_corrupt")}
    columns["correct"] = np.array([record["correct"] for record in kept])
    return TaskTrace(
        [example.id for example in examples],
        [example.task for example in examples],
        cells,
        ie=effects(kept, cells),
        sigma=task_survey.sigma[options.sigma],
        **columns,
    )


def traced(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    options: TraceOptions,
    interventions: Sequence[Intervention] = (),
) -> list[Example]:
    """The examples of which a trace consists, each with the scored answer in first place."""
    examples = [with_gold_first(example, options.gold) for example in examples]
    return answered(model, processor, examples, options.batch, interventions) if options.correct_only else examples


def check_corruption(options: TraceOptions, interventions: Sequence[Intervention]) -> None:
    """Refuses corruptions of the picture under interventions in the vision tower: the difference that they add to the
    embeddings is that of the unchanged tower."""
    in_tower = any(stage(site) is Stage.VISION for intervention in interventions for site in intervention.sites)
    if in_tower and CORRUPTIONS[options.corruption].visual:
        raise UserError(
            f"--corruption {options.corruption} changes the picture, which --intervention changes in the vision tower: "
            "corrupt the question"
        )


def trace_batch(
    corrupt: Corrupter,
    rows: Sequence[int],
    batch: Batch,
    interventions: Sequence[Intervention] = (),
    patches: Patches | None = None,
) -> list[dict]:
    """The records of a batch, one per sample, ready for JSON: ``id``, ``task``, ``correct``, ``p_clean``,
    ``p_corrupt (R,)`` and ``ie (R, C)``.

    Args:
        rows: the numbers of the batch's examples.
        interventions: see :func:`trace_examples`.
        patches: makes the batch's patches; None: as for a trace of these examples alone.
    """
    model, options = corrupt.model, corrupt.options
    always = acting(bind(interventions, batch), model.depths)
    examples = [corrupt.examples[row] for row in rows]
    read = gold = Gold.of(batch.inputs, batch.spans["answer"])
    if options.metric == "logit_difference":
        read = _difference(corrupt, rows, batch)
    if patches is None:
        patches = Patches(model, corrupt.processor, corrupt.examples, options, interventions=interventions)
    variants, shape, present = patches(rows, batch)
    breaks = options.direction == "break"
    features = _features(model, batch.inputs)
    p_corrupt, ie = [], []
    for replicate in range(options.replicates):
        corruption = *corrupt(rows, batch, replicate), *always
        # Patches are put into the base run; values of the other run come from the one that the sweep calls clean.
        base, other = (always, corruption) if breaks else (corruption, always)
        runs = sweep_runs(model, batch.inputs, variants, read, base=base, clean=other, features=features)
        clean_run, corrupted_run = (runs.base, runs.clean) if breaks else (runs.clean, runs.base)
        clean, corrupted, patched = (measured(r, options.metric) for r in (clean_run, corrupted_run, runs.variants))
        patched = patched.reshape(*shape, -1).swapaxes(0, 1).reshape(len(variants), -1)  # layer by layer
        p_corrupt.append(corrupted)
        ie.append((clean - patched if breaks else patched - corrupted).T)
    scores = clean_run if read is gold else _scores(model, batch.inputs, gold.replace(first=0), always)
    correct = fetch(scores.correct)
    known = np.tile(present, (1, len(variants) // present.shape[1]))  # groups are the last axis of the grid
    for i, example in enumerate(examples):
        if not all(np.isfinite(values[i]).all() for values in (clean, *p_corrupt, *ie)):
            raise UserError(
                f"example {example.id!r}: the model's outputs are not finite numbers: check its weights, or use "
                "--dtype float32 if they overflow"
            )
    return [
        {
            "id": example.id,
            "task": example.task,
            "correct": bool(correct[i]),
            "p_clean": _short(clean[i]),
            "p_corrupt": [_short(p[i]) for p in p_corrupt],
            "ie": [[_short(value) if k else None for value, k in zip(cells[i], known[i], strict=True)] for cells in ie],
        }
        for i, example in enumerate(examples)
    ]


def _difference(corrupt: Corrupter, rows: Sequence[int], batch: Batch) -> LogitDifference:
    examples = corrupt.examples
    foils = [dataclasses.replace(examples[row], answers=(foil(examples, row),)) for row in rows]
    foils += foils[-1:] * (len(batch.inputs.input_ids) - len(rows))
    encoded = encode(foils, corrupt.processor, corrupt.model.config)
    return LogitDifference.of(batch.inputs, batch.spans["answer"] | batch.spans["end"], encoded.inputs)


@jax.jit
def _features(model: Model, inputs: Inputs):
    return model.features(inputs)[0]


@jax.jit
def _scores(model: Model, inputs: Inputs, gold: Gold, interventions: tuple[Intervention, ...]):
    x, _ = model.hidden(inputs, interventions)
    return gold(model, model.text.norm(x), 0)


def _short(value: np.float32) -> float:
    """The float with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))


def measured(scores: Any, metric: str) -> Float[np.ndarray, "*variants batch"]:
    """A run's read-out in the metric's units."""
    match metric:
        case "probability":
            return fetch(scores.probability)
        case "log_probability":
            return fetch(scores.log_probability)
        case _:  # logit_difference: the read-out itself
            return fetch(scores)


def with_gold_first(example: Example, rule: str) -> Example:
    """The example with the answer that ``rule`` (``--gold``) chooses in first place. The first answer is scored."""
    if rule == "commonest":  # answers come in this order
        return example
    answers = sorted(example.answers, key=len, reverse=rule == "longest")
    return dataclasses.replace(example, answers=tuple(answers))


def foil(examples: Sequence[Example], row: int) -> str:
    """A wrong answer to compare with: another choice or, if there is none, the answer of another sample."""
    example = examples[row]
    right = {normalise(answer) for answer in example.answers}
    choices, gold = example.choices or (), example.gold
    if choices and gold is not None and example.answers[0] not in choices and example.answers[0] in set(LETTERS):
        choices = LETTERS[: len(choices)]  # the question asks for a letter
    wrong = [choice for i, choice in enumerate(choices) if i != gold and normalise(choice) not in right]
    return wrong[0] if wrong else counterpart(examples, row).answers[0]


def answered(
    model: Model,
    processor: Processor,
    examples: list[Example],
    size: int,
    interventions: Sequence[Intervention] = (),
) -> list[Example]:
    """The examples whose gold answer greedy decoding would write, under interventions."""
    right = np.zeros(len(examples), bool)
    for rows, batch in batches(examples, processor, model.config, size, align=PREFIX_BUCKET):
        gold = Gold.of(batch.inputs, batch.spans["answer"]).replace(first=0)
        right[rows] = fetch(_scores(model, batch.inputs, gold, bind(interventions, batch)).correct)[: len(rows)]
    kept = [example for example, keep in zip(examples, right, strict=True) if keep]
    if not kept:
        raise UserError("the model answers no sample correctly: drop --correct-only or choose other samples")
    return kept


def cells_of(config: Config, options: TraceOptions) -> list[str]:
    """The names of the cells that a trace with these options has, in the order of ``ie``'s last axis."""
    heads = config.text.num_attention_heads if options.heads else None
    return cell_names(config.text.num_hidden_layers, heads=heads, groups=options.groups)


def trace_task(
    run: Run,
    folder: str,
    model: Model,
    processor: Processor,
    task: str,
    examples: list[Example],
    options: TraceOptions,
    *,
    interventions: Sequence[Intervention] = (),
    reference: Sequence[Example] | None = None,
) -> dict:
    """Traces a task into ``folder`` of a run and returns its summary. If an earlier session finished the trace, it only
    reads the summary.

    It writes ``samples.jsonl`` batch by batch; then ``summary.json``, ``summary.parquet``, ``trace.parquet``, and
    figures with their data.
    """

    from interventions.figures.base import save_figure  # Matplotlib takes a second to import
    from interventions.figures.tracing import heatmap, interval_plot, position_map

    def make() -> dict:
        begun = time.perf_counter()
        log = run.log(f"{folder}samples.jsonl", Artifact("samples", f"{task}: effects of every sample", SAMPLES))
        # A trace under interventions says nothing about the model alone, so placements refuse its fingerprint.
        names = [fingerprint(model), *([digest(interventions)] if interventions else [])]
        result = trace_examples(
            model, processor, examples, options, task, log, interventions=interventions, reference=reference
        )
        how = {"patch": options.patch, "direction": options.direction}
        summary = {"task": task, "fingerprint": "+".join(names), **how, **summarise(result, options)}
        run.write(
            f"{folder}trace.parquet",
            lambda path: write_effects(path, {task: result}, options.eps),
            Artifact("table", f"{task}: effects by sample, replicate and cell", EFFECTS),
        )
        run.write(
            f"{folder}summary.parquet",
            lambda path: write_rows(path, summary["cells"]),
            Artifact("table", f"{task}: restoration rate of every cell by every statistic", CELLS),
        )
        numbers = {task: sample_count(summary)}
        if set(result.cells) == set(module_names(model.config.text.num_hidden_layers)):
            title, panels = f"{task}: {options.rate} by layer and module", {task: by_module(summary)}
            save_figure(
                run, f"{folder}heatmap", heatmap, title, panels=panels, samples=numbers, label=f"{options.rate} (RR)"
            )
        if len(options.groups) > 1 and not options.heads:
            title, panels = f"{task}: {options.rate} by layer and tokens", by_position(summary, options.groups)
            save_figure(run, f"{folder}positions", position_map, title, panels=panels, groups=options.groups)
        title = f"{task}: {options.rate} of every cell with its 95 % interval"
        estimates = {task: bounds(summary)._asdict() | {"samples": numbers[task]}}
        save_figure(run, f"{folder}intervals", interval_plot, title, cells=result.cells, groups=estimates)
        run.timed(f"trace {folder or task}".rstrip("/"), begun)
        return summary

    return run.once(f"{folder}summary.json", make, Artifact("metrics", f"{task}: restoration rates", SUMMARY))
