"""The report of P2's study: a table of dictionaries, of filters, ablations and recall, and their figures."""

from collections.abc import Mapping, Sequence

import numpy as np

from interventions.figures.base import save_figure
from interventions.figures.diff import recalled
from train.study.artifacts import DIFFING_SUMMARY
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run

#: Accuracy changes that P2 reports on ablation, in points: on the feature's relation of VSR, on VQA, on others.
REPORTED = [
    {"relation": "above", "layer": 7, "vsr": -15.54, "vqa": -0.10, "others": -0.88},
    {"relation": "across from", "layer": 11, "vsr": -12.77, "vqa": -0.40, "others": 0.00},
    {"relation": "below", "layer": 9, "vsr": -11.19, "vqa": -0.80, "others": 1.08},
    {"relation": "at the right side of", "layer": 14, "vsr": -10.21, "vqa": -0.30, "others": -1.71},
    {"relation": "left of", "layer": 12, "vsr": -9.05, "vqa": -0.40, "others": -0.95},
    {"relation": "beside", "layer": 18, "vsr": -7.98, "vqa": -0.30, "others": 0.00},
]


def report(
    run: Run,
    quality: Mapping[str, dict],
    cosines: Mapping[str, float],
    seeds: Mapping[int, float],
    compared: dict,
    recall: Sequence[dict],
    crosscoders: Sequence[dict],
) -> str:
    """Writes ``study.json``, ``study.md`` and the figure of recall, and returns the text of ``study.md``.

    Args:
        quality: condition -> what its dictionaries explain.
        cosines: condition -> mean cosine with the text model's dictionaries.
        seeds: layer -> mean cosine between the most similar latents of two seeds.
        compared: the results of the comparison.
        recall: a record for each relation and layer.
        crosscoders: a record for each layer.
    """
    rows = [_quality_row(name, one, cosines.get(name)) for name, one in quality.items()]
    summary = {
        "dictionaries": rows,
        "between_seeds": {str(layer): value for layer, value in seeds.items()},
        "compared": compared,
        "recall": list(recall),
        "crosscoders": list(crosscoders),
        "reported": REPORTED,
    }
    run.save_json("study.json", summary, Artifact("metrics", "P2's study", DIFFING_SUMMARY))
    tables = [_quality_table(rows), _filter_table(compared), _ablation_table(compared), _recall_table(recall)]
    text = "\n\n".join([*tables, _crosscoder_table(crosscoders)])
    run.write("study.md", lambda path: path.write_text(text + "\n"), Artifact("table", "P2's study, as tables"))
    title = "How well one number tells whether a relation holds: supervised, dictionary, random dictionaries"
    save_figure(run, "recall", recalled, title, records=list(recall))
    return text


def _quality_row(name: str, quality: dict, cosine: float | None) -> dict:
    found = list(quality["dictionaries"].values())
    groups = [group for group in ("all", "image", "text", "question") if group in found[0]["fvu"]]
    row = {f"fvu {group}": float(np.mean([one["fvu"][group] for one in found])) for group in groups}
    row["published fvu text"] = float(np.mean([one["published_fvu"]["text"] for one in found]))
    known = [one["recovered"] for one in found if one["recovered"] is not None]
    dead, recovered = float(np.mean([one["dead"] for one in found])), float(np.mean(known)) if known else None
    return {"condition": name, **row, "dead": dead, "recovered": recovered, "cosine": cosine}


def _quality_table(rows: Sequence[dict]) -> str:
    lines = [
        "| dictionaries | FVU, all | image | text | question | text, as published | dead | loss recovered | cosine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = [f"fvu {group}" for group in ("all", "image", "text", "question")]
        names += ["published fvu text", "dead", "recovered", "cosine"]
        cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
        lines.append(f"| {row['condition']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _filter_table(compared: dict) -> str:
    steps = list(next(iter(compared["survivors"].values())))
    lines = [f"| latents left after | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
    for key in ("survivors", "data_only", "second_seed", "from_scratch"):
        title = "" if key == "survivors" else f"{key.replace('_', ' ')}: "
        for relation, counts in compared.get(key, {}).items():
            lines.append(f"| {title}{relation} | {' | '.join(str(counts[step]) for step in steps)} |")
    return "\n".join(lines)


def _ablation_table(compared: dict) -> str:
    lines = [
        "| features removed | number | target | other relations | neutral | log-odds: target | others | neutral |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for selection, sets in compared["ablations"].items():
        names = ("target", "others", "neutral")
        changes = " | ".join(f"{sets[name]['change']:+.3f}" if name in sets else "" for name in names)
        margins = " | ".join(f"{sets[name]['margin']:+.3f}" if name in sets else "" for name in names)
        lines.append(f"| {selection} | {sets['target']['features']} | {changes} | {margins} |")
    return "\n".join(lines)


def _recall_table(recall: Sequence[dict]) -> str:
    lines = [
        "| relation | layer | supervised | features | best latent | random dictionaries | of these as good |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in recall:
        features = "" if record["features"] is None else f"{record['features']:.3f}"
        low, high = min(record["random"]), max(record["random"])
        numbers = f"{record['ceiling']:.3f} | {features} | {record['best']:.3f} | {low:.3f} to {high:.3f}"
        numbers += f" | {record['as_good']:.2f}"
        lines.append(f"| {record['relation']} | {record['layer']} | {numbers} |")
    return "\n".join(lines)


def _crosscoder_table(records: Sequence[dict]) -> str:
    """Latents by the model they belong to, and the mean AUROC over relations."""
    lines = [
        "| crosscoder of layer | FVU, text model | FVU, vision-language model | latents: text model | both | "
        "vision-language model | AUROC, best latent | best of the vision-language model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [f"{value:.3f}" for value in record["fvu"].values()] + list(map(str, record["latents"].values()))
        for key in ("best", "own"):
            known = [found[key] for found in record["auroc"].values() if found[key] is not None]
            cells.append(f"{np.mean(known):.3f}" if known else "")
        lines.append(f"| {record['layer']} | {' | '.join(cells)} |")
    return "\n".join(lines)
