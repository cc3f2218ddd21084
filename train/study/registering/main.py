"""P1's study of Registering: method, number of registers, or data?"""

import itertools
import time

from eval.judging import clusters_of
from train.loop import WATCHING
from train.registering import check_without_registers
from train.study.registering.options import Args
from train.study.registering.report import report
from train.study.registering.study import Study, study_options, training_sets
from train.subsets import check_trainable
from vlm_jax import Model
from vlm_jax.data import Example, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import check_fit
from vlm_jax.runs.processes import progress
from vlm_jax.runs.startup import load_tasks, start


def fewest_visual_tokens(examples: list[Example], model: Model, processor: Processor) -> int:
    """The number of visual tokens of the smallest picture."""
    vision = model.config.vision
    assert vision is not None, "examples with images fit no text-only model"
    return min(vision.size_of(processor.image_processor, example.images[0])[1] for example in examples)


def run_registering(args: Args) -> None:
    """Runs every condition with every seed, and prints and writes the report."""
    began = time.perf_counter()
    args.check_loop()
    conditions, trained = args.chosen(), training_sets(args)
    tasks = load_tasks(args.questions, split="test", limit=args.eval_limit, options=args)
    tested = list(itertools.chain(*tasks.values()))
    everything = [*itertools.chain(*trained.values()), *tested]
    check_disjoint(list(itertools.chain(*trained.values())), tested)
    for example in everything:
        if len(example.images) != 1:
            raise UserError(f"example {example.id!r} has {len(example.images)} images: this study needs one in each")
    data = {"train": {name: source(name, split="train", options=args) for name in (args.captions, *args.questions)}}
    data["test"] = {name: source(name, split="test", options=args) for name in args.questions}

    def check(model: Model) -> None:
        check_without_registers(model)
        check_trainable(model)

    run, model, processor = start(args, everything, data, check=check, ignored=WATCHING, shown=tested)
    for options in {
        c.registers: study_options(args, c, 0, model) for c in conditions if c.registers is not None
    }.values():
        masked = model.with_registers(options.registers_of(model, processor))  # refused here, before any training
        check_fit(everything, processor, masked.config)
    if args.layer >= model.depths["text"] - 1:
        raise UserError(f"--layer is {args.layer}: the model has {model.depths['text']} layers, name an earlier one")
    fewest = fewest_visual_tokens(tested, model, processor)
    if absent := [c for c in conditions if c.count > fewest]:
        names = ", ".join(condition.name for condition in absent)
        print(f"note: a picture has {fewest} visual tokens, so these conditions are left out: {names}")
    conditions = [c for c in conditions if c not in absent]
    study = Study(args, run, model, processor, trained, tested)
    cells: dict = {condition: [] for condition in conditions}
    todo = [(c, seed) for c in conditions for seed in (args.seeds if c.data is not None else args.seeds[:1])]
    for condition, seed in progress(todo, desc="study", unit="cell"):
        cells[condition].append(study.cell(condition, seed))
    print(report(run, cells, tested, clusters_of(tested)))
    print(f"{time.perf_counter() - began:.0f} s; tables, figures and answers are in {args.out}")
