"""P2's study of model diffing."""

import time

from interventions.diff.ablation import truths
from interventions.diff.features import rotation
from interventions.diff.selection import large_enough
from train.loop import WATCHING
from train.study.diffing.options import Args
from train.study.diffing.report import report
from train.study.diffing.study import Loaded, Study, between_seeds, check_answers, conditions
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.prompts import check_fit
from vlm_jax.runs.processes import progress
from vlm_jax.runs.startup import load_tasks, start


def run_diffing(args: Args) -> None:
    """Trains every dictionary, compares them, and prints and writes the report."""
    began = time.perf_counter()
    args.check_loop()
    args.check_study()
    train, test = (
        tuple(load_tasks((args.task, args.neutral), split=split, limit=limit, options=args).values())
        for split, limit in (("train", args.limit), ("test", args.eval_limit))
    )
    examples = [example for part in (*train, *test) for example in part]
    check_disjoint([example for part in train for example in part], [example for part in test for example in part])
    truths(examples)
    test = (large_enough(test[0]), test[1])
    check_answers(train[0], test[0])
    data = {
        split: {name: source(name, split=split, options=args) for name in (args.task, args.neutral)}
        for split in ("train", "test")
    }
    run, model, processor = start(args, examples, data, with_answer=False, ignored=WATCHING, shown=[*test[0], *test[1]])
    models = {args.model: Loaded(model, processor)}
    chosen = conditions(args)
    for condition in chosen:
        if condition.model not in models:
            models[condition.model] = Loaded(*args.load_model(condition.model))
    for name, loaded in models.items():
        depth, width = loaded.model.depths["text"], loaded.model.config.text.hidden_size
        if (depth, width) != (model.depths["text"], model.config.text.hidden_size):
            raise UserError(
                f"{name} has {depth} layers of width {width}, unlike {args.model}: name stages of one model"
            )
        blind = loaded.model.visual is None
        check_fit(
            [e.without_images() for e in examples] if blind else examples, loaded.processor, loaded.model.config, False
        )
    run.pin("models", {name: fingerprint(loaded.model) for name, loaded in models.items()})
    study, stored, quality = Study(args, run, models, train, test), {}, {}
    for condition in progress(chosen, desc="study", unit="condition"):
        stored[condition.name], quality[condition.name] = study.trained(condition, stored.get("base"))
    base = stored["base"]
    cosines = {name: _mean_cosine(base, stored[name]) for name in stored if name not in ("base", "from scratch")}
    compared = study.compared(base, stored["adapted"], stored["data only"])
    compared["from_scratch"] = study.survivors("from-scratch-filters/", base, stored["from scratch"])
    if len(args.seeds) > 1:
        compared["second_seed"] = study.survivors("second-seed-filters/", base, stored["adapted"], args.seeds[1])
    recall = study.recalled(stored["adapted"], study.features())
    crosscoders = study.crosscoded()
    seeds = between_seeds(stored["from scratch"], args.seeds)
    print(report(run, quality, cosines, seeds, compared, recall, crosscoders))
    print(f"{time.perf_counter() - began:.0f} s; tables, figures and dictionaries are in {args.out}")


def _mean_cosine(base: dict, adapted: dict) -> float:
    """The mean cosine of a latent's direction before and after, over all dictionaries."""
    means = [
        rotation(base[place].dictionary, one.dictionary).cosine.mean()
        for place, one in adapted.items()
        if place in base
    ]
    return float(sum(means) / len(means))
