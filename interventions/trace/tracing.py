"""Causal tracing of a task's examples (P0), batch by batch, into a run folder."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from interventions.engine.grids import patch_grid
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.engine.read import Gold, LogitDifference
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import Variants
from interventions.kinds.groups import ROLES, bind, positions_of
from interventions.modules import MODULE_SITES, cell_names, module_names
from interventions.statistics import write_effects, write_rows
from interventions.store import digest
from interventions.trace.artifacts import CELLS, EFFECTS, SAMPLES, SUMMARY
from interventions.trace.corruption import CORRUPTIONS, Corrupter, counterpart, survey
from interventions.trace.options import TraceOptions
from interventions.trace.result import TaskTrace, bounds, by_module, by_position, summarise
from vlm_jax import Inputs, Model
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
from vlm_jax.runs.processes import apart, fetch, gathered, progress
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
) -> TaskTrace:
    """Traces every example.

    Args:
        log: the file of the samples' records. New ones are appended; those of an earlier session are read from it.
        interventions: those that act in every run, clean or corrupted; token groups are bound to every batch.

    Raises:
        UserError: for options that the model or these samples do not allow, or if the corruption changes pictures and
            an intervention acts in the vision tower.
    """
    check_corruption(options, interventions)
    options.check(model.config.text.num_hidden_layers)
    examples = traced(model, processor, examples, options, interventions)
    log, ids = Log() if log is None else log, [example.id for example in examples]
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
        part = log.part(team, ids)
        with progress(total=len(team_rows), desc=f"trace {label}", unit="sample") as bar:
            for rows, batch in part.missing(groups(), ids):
                bar.update(len(part.records) - bar.n)
                part.append(trace_batch(corrupt, rows, batch, interventions))
                bar.update(len(rows))
    log.join(part, ids, team)
    by_id = {record["id"]: record for record in log.records}
    kept = [by_id[example.id] for example in examples]
    columns = {name: np.array([record[name] for record in kept], float) for name in ("p_clean", "p_corrupt", "ie")}
    columns["correct"] = np.array([record["correct"] for record in kept])
    return TaskTrace(
        [example.id for example in examples],
        [example.task for example in examples],
        cells_of(model.config, options),
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
    corrupt: Corrupter, rows: Sequence[int], batch: Batch, interventions: Sequence[Intervention] = ()
) -> list[dict]:
    """The records of a batch, one per sample, ready for JSON: ``id``, ``task``, ``correct``, ``p_clean``,
    ``p_corrupt (R,)`` and ``ie (R, C)``.

    Args:
        rows: the numbers of the batch's examples.
        interventions: see :func:`trace_examples`.
    """
    acting = bind(interventions, batch)
    model, options = corrupt.model, corrupt.options
    examples = [corrupt.examples[row] for row in rows]
    read = gold = Gold.of(batch.inputs, batch.spans["answer"])
    if options.metric == "logit_difference":
        read = _difference(corrupt, rows, batch)
    variants, shape, present = grid(model.config, options, batch)
    features = _features(model, batch.inputs)
    p_corrupt, ie = [], []
    for replicate in range(options.replicates):
        base = *corrupt(rows, batch, replicate), *acting
        runs = sweep_runs(model, batch.inputs, variants, read, base=base, clean=acting, features=features)
        clean, corrupted, patched = (measured(r, options.metric) for r in (runs.clean, runs.base, runs.variants))
        patched = patched.reshape(*shape, -1).swapaxes(0, 1).reshape(len(variants), -1)  # layer by layer
        p_corrupt.append(corrupted)
        ie.append((patched - corrupted).T)
    scores = runs.clean if read is gold else _scores(model, batch.inputs, gold.replace(first=0), acting)
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


class Grid(NamedTuple):
    """The patches of a batch; the shape of their grid: sites, layers, then heads and token groups if there are any; and
    which rows have a token of each group."""

    variants: Variants
    shape: tuple[int, ...]
    present: Bool[np.ndarray, "batch groups"]


def grid(config: Config, options: TraceOptions, batch: Batch) -> Grid:
    """The patches of a batch (:class:`Grid`)."""
    tokens, present = None, np.ones((len(batch.inputs.input_ids), 1), bool)
    if options.groups != ("all",):
        tokens = [positions_of(group, batch) for group in options.groups]
        present = np.stack([mask.any(1) for mask in tokens], 1)
        # A patch must act somewhere. Of a group that no row has, nothing is recorded, so any token will do.
        last = positions_of("last", batch)
        tokens = [mask if mask.any() else last for mask in tokens]
    depth, window = config.text.num_hidden_layers, options.window
    if options.heads:
        heads = config.text.num_attention_heads
        return Grid(*patch_grid(("text.head_out",), depth, window=window, heads=heads, tokens=tokens), present)
    return Grid(*patch_grid(MODULE_SITES, depth, window=window, tokens=tokens), present)


class Present:
    """Notes which token groups some row of some batch has."""

    def __init__(self, groups: Sequence[str]):
        self.groups = groups
        self.seen = np.array([group == "all" for group in groups])

    def noted(self, batches: Iterable[tuple[list[int], Batch]]) -> Iterator[tuple[list[int], Batch]]:
        """The same batches."""
        for rows, batch in batches:
            for i in np.flatnonzero(~self.seen):
                self.seen[i] = positions_of(self.groups[int(i)], batch).any()
            yield rows, batch

    def check(self) -> None:
        """Raises a UserError, in all processes, if no sample has a token of a group. A role may be missing everywhere,
        as subjects of one token have no middle, unless it is the only group."""
        seen = np.any(gathered(self.seen.tolist()), 0)
        for group, has in zip(self.groups, seen, strict=True):
            if not has and (group not in ROLES or len(self.groups) == 1):
                raise UserError(f"--positions {group}: no sample has such a token, choose other groups")


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
        result = trace_examples(model, processor, examples, options, task, log, interventions=interventions)
        # A trace under interventions says nothing about the model alone, so placements refuse its fingerprint.
        names = [fingerprint(model), *([digest(interventions)] if interventions else [])]
        summary = {"task": task, "fingerprint": "+".join(names), **summarise(result, options)}
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
        if set(result.cells) == set(module_names(model.config.text.num_hidden_layers)):
            title = f"{task}: restoration rate by layer and module"
            save_figure(run, f"{folder}heatmap", heatmap, title, panels={task: by_module(summary)})
        if len(options.groups) > 1 and not options.heads:
            title, panels = f"{task}: restoration rate by layer and tokens", by_position(summary, options.groups)
            save_figure(run, f"{folder}positions", position_map, title, panels=panels, groups=options.groups)
        title = f"{task}: restoration rate of every cell with its 95 % interval"
        estimates = {task: bounds(summary)._asdict()}
        save_figure(run, f"{folder}intervals", interval_plot, title, cells=result.cells, groups=estimates)
        run.timed(f"trace {folder or task}".rstrip("/"), begun)
        return summary

    return run.once(f"{folder}summary.json", make, Artifact("metrics", f"{task}: restoration rates", SUMMARY))
