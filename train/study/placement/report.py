"""The report of a study: tables beside the paper's numbers, statistical comparisons, and figures."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from eval.tables import Table
from interventions import statistics
from interventions.figures import study as figures
from interventions.figures.base import plain_data, save_figure
from interventions.figures.tracing import correlation, heatmap, interval_plot, stability
from interventions.modules import folder_name, module_names
from interventions.statistics import change_text, interval_text, normalised, write_rows
from interventions.trace.result import bounds, by_module, sample_count
from interventions.trace.samples import read_effects
from train.study.artifacts import RUNS, SUMMARY
from train.study.placement.recipes import RECIPES
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run

#: Placements that choose random modules. The other placements are compared with them.
CONTROLS = ("random", "random_matched", "random_stratified")


def report(run: Run, results: dict[str, dict], args) -> str:
    """Writes ``tables/``, ``figures/``, ``summary.json`` and ``results.parquet``.

    Args:
        results: model -> the result of :func:`train.study.placement.study.run_study`.

    Returns:
        The main table and the findings, as Markdown.
    """
    recipe, families = RECIPES[args.recipe], list(args.families)
    summary, text = {}, []
    rows = []
    for model, result in results.items():
        outcomes = Outcomes(result, families)
        compared = comparisons(outcomes)
        traces = {f: json.loads((run.folder / f"{model}/trace/{f}/summary.json").read_text()) for f in families}
        differ = trace_difference(run, model, families, args)
        alone = predictions(outcomes, result["scores"])
        agreement = corruption_agreement(run, model, families, args)
        summary[model] = {
            "accuracy": [outcomes.summary(*key) for key in outcomes.keys],
            "comparisons": compared,
            "alone": alone,
            "trace": {f: {key: traces[f][key] for key in ("samples", "ranking", "rr", "stability")} for f in families},
            "trace_difference": differ,
            "corruptions": agreement,
        }
        rows += [{"model": model, **row} for row in outcomes.rows()]
        run.save_json("summary.json", summary, Artifact("metrics", "Results of the study for every model", SUMMARY))
        main = table1(outcomes, compared, recipe)
        main.save(run, f"tables/{model}/table1", f"{model}: accuracy by where LoRA was trained (P0, table 1)")
        for number, placement in ((2, "shared"), (3, "task_diff")):
            title = f"{model}: modules that {placement} chose (P0, table {number})"
            selections(outcomes, result, recipe, placement).save(run, f"tables/{model}/table{number}", title)
        comparison_table(compared).save(run, f"tables/{model}/comparisons", f"{model}: placements against controls")
        draw(run, model, outcomes, result, summary[model], traces)
        text += [f"\n{model}: accuracy on held-out examples\n", main.markdown(), *findings(outcomes, compared, alone)]
    artifact = Artifact("table", "Held-out accuracy of every training", RUNS)
    run.write("results.parquet", lambda path: write_rows(path, rows), artifact)
    return "\n".join(text)


class Outcomes:
    """The held-out scores of one model by family, placement and k: ``(runs, samples)`` each."""

    def __init__(self, result: dict, families: list[str]):
        self.families, self.depth, self.records = families, result["depth"], result["records"]
        self.by = defaultdict(list)
        for record in self.records:
            self.by[record["family"], record["placement"], record["k"]].append(record)
        #: (placement, k), in the order in which they were run.
        self.keys = list(dict.fromkeys((r["placement"], r["k"]) for r in self.records if r["placement"] != "alone"))
        self.k = next((k for _, k in self.keys if k), 0)
        self.accuracy = functools.cache(self._accuracy)

    def scores(self, family: str, placement: str, k: int) -> Float[np.ndarray, "runs samples"]:
        """The scores ``(runs, N)``. The family "both" has the samples of all families, one family after the other."""
        names = self.families if family == "both" else [family]
        return np.concatenate([[r["scores"] for r in self.by[name, placement, k]] for name in names], 1)

    def clusters(self, family: str) -> Int[np.ndarray, " samples"]:
        """The cluster number of each sample: samples that show the same image share it
        (:func:`eval.judging.clusters_of`)."""
        names = self.families if family == "both" else [family]
        parts, count = [], 0
        for name in names:
            part = np.array(self.by[name, "baseline", 0][0]["clusters"])
            parts.append(part + count)
            count += part.max() + 1
        return np.concatenate(parts)

    def comparable(self, placement: str, control: str, k: int) -> bool:
        """Whether a placement can be compared with this control. Plain random modules are a control for placements that
        choose exactly k modules; the other controls imitate task_diff, so they are controls for task_diff only."""
        if placement in ("baseline", "all", *CONTROLS) or (control, k) not in self.keys:
            return False
        if control != "random":
            return placement == "task_diff"
        return all(len(record["names"]) == k for f in self.families for record in self.by[f, placement, k])

    def parameters(self, family: str, placement: str, k: int) -> float:
        """The mean number of trained parameters."""
        return float(np.mean([record["parameters"] for record in self.by[family, placement, k]]))

    def _accuracy(self, family: str, placement: str, k: int) -> dict:
        """The mean over runs and samples, with its 95 % bootstrap interval over both."""
        scores = self.scores(family, placement, k)
        return statistics.accuracy(scores, clusters=self.clusters(family)) | {"runs": len(scores)}

    def folders(self, model: str, family: str, placement: str, k: int) -> list[str]:
        """The folders of the run that hold the answers of the runs."""
        names = self.families if family == "both" else [family]
        records = [(name, record) for name in names for record in self.by[name, placement, k]]
        cells = [
            f"{name}/" + (f"{folder_name(one['names'], self.depth)}/seed-{one['seed']}" if one["names"] else "baseline")
            for name, one in records
        ]
        return [f"{model}/cells/{cell}" for cell in dict.fromkeys(cells)]

    def summary(self, placement: str, k: int) -> dict:
        by_family = {family: self.accuracy(family, placement, k) for family in (*self.families, "both")}
        return {"placement": placement, "k": k, "accuracy": by_family}

    def rows(self) -> list[dict]:
        """A row for each run, so that users can compute other statistics."""
        names = ("family", "placement", "k", "seed", "accuracy", "stderr", "samples", "parameters")
        return [{**{name: r[name] for name in names}, "modules": " ".join(r["names"])} for r in self.records]


def comparisons(outcomes: Outcomes) -> list[dict]:
    """Compares every placement with as many random modules, and task_diff with the controls that imitate it.

    Each comparison has the paired difference with its interval over samples and runs, its p-value, the p-value adjusted
    by Holm's method for all comparisons of a family with the same control, and McNemar's test of the first runs.
    """
    rows = []
    for control in CONTROLS:
        for family in (*outcomes.families, "both"):
            part = []
            for placement, k in outcomes.keys:
                if not outcomes.comparable(placement, control, k):
                    continue
                first, second = outcomes.scores(family, placement, k), outcomes.scores(family, control, k)
                pair = statistics.paired(first, second, clusters=outcomes.clusters(family))
                pair |= statistics.mcnemar(first[0], second[0])
                part.append({"placement": placement, "k": k, "against": control, "family": family, **pair})
            for row, p in zip(part, statistics.holm([row["p"] for row in part]) if part else [], strict=True):
                row["p_holm"] = float(p)
            rows += part
    return rows


def trace_difference(run: Run, model: str, families: list[str], args) -> dict:
    """Whether the two families' restoration rates differ, for each module: raw, and normalised (P0, equation 7). The
    test is a permutation test with a controlled false discovery rate."""
    traced = [read_effects(run.folder / f"{model}/trace/{family}/samples.jsonl") for family in families]
    tests: dict[str, dict | None] = {}
    for name, normalise in (("raw", False), ("normalised", True)):
        options = {"min_te": args.tracing.min_te, "eps": args.tracing.eps, "statistic": args.tracing.statistic}
        try:
            difference = statistics.permutation_test(*traced, normalise=normalise, **options)
        except UserError:  # there is no sample, or no positive rate to normalise by
            tests[name] = None
            continue
        tests[name] = plain_data(difference._asdict())
    return tests


def corruption_agreement(run: Run, model: str, families: list[str], args) -> dict:
    """Family -> rank correlations between the restoration rates under different corruptions."""
    agreement = {}
    for family in families:
        folders = {args.tracing.corruption: f"trace/{family}"}
        folders |= {kind: f"trace/{kind}/{family}" for kind in args.corruptions}
        rates = {
            kind: np.array(list(json.loads((run.folder / model / folder / "summary.json").read_text())["rr"].values()))
            for kind, folder in folders.items()
        }
        agreement[family] = statistics.correlations(rates)
    return agreement


def predictions(outcomes: Outcomes, scores: dict) -> dict:
    """How well each score predicts where LoRA helps: Spearman's rank correlation, over modules, between the score and
    the accuracy gained by LoRA on that module alone. It is None if the score or the gain is the same for all modules.
    There is no p-value, because the modules are not a sample: they are all that the model has."""
    predicted = {}
    every = module_names(outcomes.depth)
    for family in outcomes.families:
        alone = {r["names"][0]: r["accuracy"] for r in outcomes.by[family, "alone", 1]}
        if not alone:
            continue
        base = outcomes.by[family, "baseline", 0][0]["accuracy"]
        gains = np.array([alone[name] - base for name in every])
        sizes = {r["names"][0]: r["parameters"] for r in outcomes.by[family, "alone", 1]}
        tried = {name: np.ravel(values[family]) for name, values in scores.items()}
        tried |= {
            "depth": np.repeat(np.arange(outcomes.depth), 2),
            "parameters": np.array([sizes[name] for name in every]),
        }
        predicted[family] = {
            "gains": dict(zip(every, gains.tolist(), strict=True)),
            "spearman": {
                name: float(spearmanr(v, gains).statistic) if np.ptp(v) and np.ptp(gains) else None
                for name, v in tried.items()
            },
        }
    return predicted


# Tables.


def paper_family(family: str) -> str:
    """The paper's name for a task family: "knowledge" for "p0-knowledge"."""
    return family.removeprefix("p0-")


def condition_name(placement: str, k: int) -> str:
    """The name of a condition in tables and figures."""
    return {"baseline": "baseline", "all": "all modules"}.get(placement, f"{placement}, k = {k}")


def table1(outcomes: Outcomes, compared: list[dict], recipe) -> Table:
    """P0's Table 1 with intervals, the difference from random modules, and the paper's numbers."""
    header = ["LoRA on", "trained"]
    header += [name for family in outcomes.families for name in (family, f"{family} less random")]
    header += [f"{model} (paper), {' / '.join(map(paper_family, outcomes.families))}" for model in recipe.reported]
    rows = []
    for placement, k in outcomes.keys:
        if k not in (0, outcomes.k) and placement != "all":
            continue
        sizes = dict.fromkeys(f"{outcomes.parameters(f, placement, k):,.0f}" for f in outcomes.families)
        row = [condition_name(placement, k), " / ".join(sizes) if placement != "baseline" else "-"]
        for family in outcomes.families:
            row += [interval_text(outcomes.accuracy(family, placement, k)), _difference(compared, placement, k, family)]
        for reported in recipe.reported.values():
            values = reported.get(placement, {})
            row.append(
                " / ".join(
                    f"{values[paper_family(f)]:.3f}" if paper_family(f) in values else "-" for f in outcomes.families
                )
            )
        rows.append(tuple(row))
    return Table(tuple(header), rows)


def _difference(compared: list[dict], placement: str, k: int, family: str) -> str:
    for row in compared:
        if (row["placement"], row["k"], row["family"], row["against"]) == (placement, k, family, "random"):
            return change_text(row)
    return "-"


def selections(outcomes: Outcomes, result: dict, recipe, placement: str) -> Table:
    """P0's Tables 2 and 3: the modules that a placement chose, with their scores, and those in the paper."""
    rr = {family: np.array(values) for family, values in result["scores"]["rr"].items()}
    names, rows = module_names(outcomes.depth), []
    for number, family in enumerate(outcomes.families):
        values = rr[family]
        if placement == "task_diff":
            values = normalised(rr[family]) - normalised(rr[outcomes.families[1 - number]])
        chosen = outcomes.by[family, placement, outcomes.k]
        ranked = sorted(chosen[0]["names"] if chosen else [], key=lambda name: -values.ravel()[names.index(name)])
        ours = ", ".join(f"{name} ({values.ravel()[names.index(name)]:+.2f})" for name in ranked)
        paper = ", ".join(recipe.selected[placement].get(paper_family(family), ())) or "-"
        rows.append((family, ours, paper))
    return Table(("family", f"modules (k = {outcomes.k})", f"Qwen3-VL-4B (paper, of {recipe.modules})"), rows)


def comparison_table(compared: list[dict]) -> Table:
    """Every comparison of :func:`comparisons`."""
    header = ("placement", "k", "against", "family", "difference", "95 % interval", "p", "p (Holm)", "gained / lost")
    header += ("McNemar p",)
    rows = [
        (
            row["placement"],
            str(row["k"]),
            row["against"],
            row["family"],
            f"{row['difference']:+.3f}",
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['p']:.3f}",
            f"{row['p_holm']:.3f}",
            "-" if row["gained"] is None else f"{row['gained']} / {row['lost']}",
            "-" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.3f}",
        )
        for row in compared
    ]
    return Table(header, rows)


def findings(outcomes: Outcomes, compared: list[dict], alone: dict) -> list[str]:
    """The main results, one sentence each."""
    lines = []
    for family in (*outcomes.families, "both"):
        tested = [r for r in compared if r["family"] == family and r["against"] == "random"]
        for word, sign in (("better", 1), ("worse", -1)):
            sure = [r for r in tested if r["p_holm"] < 0.05 and np.sign(r["difference"]) == sign]
            names = (
                ", ".join(f"{condition_name(r['placement'], r['k'])} ({r['difference']:+.3f})" for r in sure) or "none"
            )
            lines.append(f"* {family}: of {len(tested)} placements {word} than as many random modules (Holm): {names}.")
        if tested:
            low, high = (f(r["excluded"] for r in tested) for f in (min, max))
            lines.append(f"* {family}: their 95 % intervals exclude differences larger than {low:.3f} to {high:.3f}.")
    for family, predicted in alone.items():
        rho = {name: value for name, value in predicted["spearman"].items() if value is not None}
        if not rho:
            lines.append(f"* {family}: LoRA gains the same on every module alone, so no score can be compared with it.")
            continue
        shown = ", ".join(f"{name} {rho[name]:+.2f}" for name in sorted(rho, key=lambda name: -rho[name]))
        lines.append(f"* {family}: rank correlation of each score with the gain of LoRA on a module alone: {shown}.")
    return lines


# Figures.


def draw(run: Run, model: str, outcomes: Outcomes, result: dict, summary: dict, traces: dict[str, dict]) -> None:
    """Draws P0's figures 2 to 4, and the study's further figures."""
    families, names = outcomes.families, module_names(outcomes.depth)
    rr = {family: np.array(result["scores"]["rr"][family]) for family in families}
    one, other = (normalised(rr[family]) for family in families)
    difference = {f"{families[0]} - {families[1]}": one - other}
    tasks = {task: by_module({"rr": rates}) for trace in traces.values() for task, rates in trace["tasks"].items()}
    counts = {family: sample_count(trace) for family, trace in traces.items()}
    of_tasks = {task: n for trace in traces.values() for task, n in trace.get("task_samples", {}).items()}

    def write(name: str, draw: Callable, title: str, **data) -> None:
        save_figure(run, f"figures/{model}/{name}", draw, f"{model}: {title}", pdf=True, **data)

    write("figure2", heatmap, "restoration rate by layer and module (P0, figure 2)", panels=rr, samples=counts)
    label_of_difference = "difference of normalised RR"
    both = dict.fromkeys(difference, " and ".join(str(counts[family]) for family in families))
    title = f"{label_of_difference} (P0, figure 3)"
    write("figure3", heatmap, title, panels=difference, label=label_of_difference, samples=both)
    write("figure4", heatmap, "restoration rate by task (P0, figure 4)", panels=tasks, samples=of_tasks)
    tested = summary["trace_difference"]["raw"]
    different = tested and [q < 0.05 for q in tested["q"]]
    estimates = {family: bounds(trace)._asdict() | {"samples": counts[family]} for family, trace in traces.items()}
    title = "restoration rate of every module with its 95 % interval"
    write("intervals", interval_plot, title, cells=names, groups=estimates, different=different)
    if all(trace["stability"] for trace in traces.values()):
        by_family = {family: trace["stability"] for family, trace in traces.items()}
        write("stability", stability, "rank correlation between disjoint halves of the samples", groups=by_family)
    for family, agreement in summary["corruptions"].items():
        if agreement:
            title = f"correlation of restoration rates under different corruptions, {family}"
            write(f"corruptions_{family}", correlation, title, rows=agreement)
    at_k = [(p, k) for p, k in outcomes.keys if k in (0, outcomes.k) or p == "all"]
    accuracy = {
        f: {
            condition_name(p, k): outcomes.accuracy(f, p, k) | {"folders": outcomes.folders(model, f, p, k)}
            for p, k in at_k
        }
        for f in (*families, "both")
    }
    write("placements", figures.placements, "accuracy by placement", accuracy=accuracy)
    swept = sorted({p for p, k in outcomes.keys if k not in (0, outcomes.k)} - {"all"})
    if swept:
        curves = {
            f: {p: {k: outcomes.accuracy(f, p, k) for q, k in outcomes.keys if q == p} for p in swept} for f in families
        }
        write("k", figures.k_sweep, "accuracy by the number of modules with LoRA", accuracy=curves)
    gains = {family: list(predicted["gains"].values()) for family, predicted in summary["alone"].items()}
    if gains:
        flat = {family: rr[family].ravel() for family in gains}
        title = "LoRA's gain in single modules against their restoration rate"
        scored = {family: accuracy[family]["baseline"]["samples"] for family in gains}
        write("alone", figures.alone, title, rr=flat, gains=gains, names=names, samples=scored)
