"""Tables of model diffing: effects of ablations with intervals, heads, and what is printed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from interventions.diff.ablation import Answered
from interventions.diff.heads import Agreement, Scores
from interventions.diff.selection import Feature
from interventions.statistics import holm, paired


def _named(feature: Feature) -> dict[str, Any]:
    """The columns that name a feature."""
    place = feature.place
    return {
        "site": place.site,
        "layer": place.layer,
        "seed": place.seed,
        "latent": feature.latent,
        "relation": feature.relation,
    }


def ablation_rows(
    features: Sequence[Feature],
    spatial: Answered,
    relations: Sequence[str],
    neutral: Answered,
    clusters: tuple[Sequence[int], Sequence[int]],
    seed: int,
) -> list[dict]:
    """A row for each feature and set of questions, for ``ablations.parquet``. A set without questions has none.

    Args:
        spatial, neutral: the answers without each feature's direction, in the features' order.
        relations: the relation of each spatial question.
        clusters: of the spatial and of the neutral questions, which are resampled together.
    """
    rows, of = [], np.asarray(relations)
    for number, feature in enumerate(features):
        target = of == feature.relation
        everything = np.ones(len(clusters[1]), bool)
        sets = {
            "target": (spatial, clusters[0], target),
            "others": (spatial, clusters[0], ~target),
            "neutral": (neutral, clusters[1], everything),
        }
        for name, (answered, groups, chosen) in sets.items():
            if not chosen.any():
                continue
            options: dict[str, Any] = {"clusters": np.asarray(groups)[chosen], "resamples": 2000, "seed": seed}
            before, after = answered.correct[chosen], answered.correct_without[number][chosen]
            found = paired(after.astype(float), before.astype(float), **options)
            margin = paired(answered.margin_without[number][chosen], answered.margin[chosen], **options)
            rows.append(
                {
                    **_named(feature),
                    "selection": feature.selection,
                    "questions": name,
                    "samples": len(before),
                    "before": found["second"],
                    "after": found["first"],
                    **{key: found[key] for key in ("difference", "low", "high", "p")},
                    "p_holm": None,
                    "margin": margin["difference"],
                    "margin_low": margin["low"],
                    "margin_high": margin["high"],
                }
            )
    for selection in {feature.selection for feature in features}:
        targets = [row for row in rows if row["selection"] == selection and row["questions"] == "target"]
        for row, adjusted in zip(targets, holm([row["p"] for row in targets]), strict=True):
            row["p_holm"] = float(adjusted)
    return rows


def ablation_summary(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Selection -> questions -> means over its features, and their number."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["selection"], {}).setdefault(row["questions"], []).append(row)

    def summarised(of: Sequence[dict]) -> dict:
        change, margin = (float(np.mean([row[name] for row in of])) for name in ("difference", "margin"))
        return {"change": change, "margin": margin, "features": len(of)}

    return {
        selection: {questions: summarised(of) for questions, of in sets.items()} for selection, sets in groups.items()
    }


def head_rows(features: Sequence[Feature], scores: Scores) -> list[dict]:
    """A row for each feature and head, for ``heads.parquet``. The features are those of ``scores``, in order."""
    return [
        {
            **_named(feature),
            "head_layer": layer,
            "head": head,
            **{name: float(part[number, layer, head]) for name, part in scores._asdict().items()},
        }
        for number, feature in enumerate(features)
        for layer, head in np.ndindex(scores.exact.shape[1:])
    ]


def agreement_rows(features: Sequence[Feature], found: Sequence[Agreement]) -> list[dict]:
    """For each feature, how well attribution agrees with exact patching; unknown numbers are None."""
    return [
        {
            **_named(feature),
            **{name: None if np.isnan(value) else value for name, value in one._asdict().items()},
        }
        for feature, one in zip(features, found, strict=True)
    ]


def show(results: dict) -> None:
    """Prints what was found."""
    print("dictionary                    adapted  mean cosine  relocated")
    for name, one in results["adapted"].items():
        print(f"{name:28s}  {one['share']:.3f}    {one['cosine']:.3f}        {one['relocated']:.3f}")
    steps = list(next(iter(results["survivors"].values())))
    for title, key in (("latents left after each filter", "survivors"), ("data-only control", "data_only")):
        if results[key]:
            print(f"\n{title:28s}" + "".join(f"{step:>12s}" for step in steps))
            for relation, counts in results[key].items():
                print(f"{relation:28s}" + "".join(f"{counts[step]:12d}" for step in steps))
    if results["agreement"]:
        ranks = [one["rank"] for one in results["agreement"] if one["rank"] is not None]
        five = [one["first_five"] for one in results["agreement"]]
        print(
            f"\nattribution against exact patching, {len(five)} features: rank correlation {np.mean(ranks):.2f}, "
            f"{np.mean(five):.0%} of the first five heads"
        )
    print("\nchange of accuracy, and of the right answer's log-odds, without a feature's direction; mean over features")
    print(f"{'selection':14s} features   target   others  neutral  | target   others  neutral")
    for selection, sets in results["ablations"].items():
        changes, margins = (
            "".join(f"{sets[name][key]:+9.3f}" if name in sets else " " * 9 for name in ("target", "others", "neutral"))
            for key in ("change", "margin")
        )
        print(f"{selection:14s} {sets['target']['features']:8d}{changes}  {margins}")
