"""P2's first half: trains sparse dictionaries of a model's activations, and measures what they explain.

python -m train.sae --model mini-llava --layers 2 4 6 --task mini-vsr mini-vqa --out runs/sae
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from interventions.diff.compare import dictionaries_digest
from train.dictionary_stage import Stage, StageOptions, begin_with, places_of, show
from train.loop import WATCHING
from vlm_jax.data import source
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_tasks, start


@dataclasses.dataclass(frozen=True)
class Args(StageOptions, DataOptions, ModelOptions):
    """Train sparse dictionaries (sparse autoencoders) of a model's activations, one for each site, layer and seed, all
    in one compiled step (P2).

    The activations are those of prompts without answers. With --init DIR the dictionaries of another run, such as one
    on the text model, are adapted to this model. interventions.diff compares the two; SAELens loads the results.
    """

    init: str = "random"
    """random, or the run folder of another train.sae, whose dictionaries of the same sites and layers are trained
    further (adaptation)."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ("mini-vsr", "mini-vqa")
    """Tasks, families, datasets or JSONL files whose prompts are read; their train splits are used."""
    limit: Annotated[int | None, Range(least=1)] = 2000
    """Largest number of training examples of each task."""
    eval_limit: Annotated[int, Range(least=1)] = 200
    """Number of examples of each task's test split on which the dictionaries are measured."""
    images: bool = True
    """Whether the model sees the pictures. --no-images gives it the questions alone, so that a text-only model can read
    the same examples."""
    out: Path = Path("runs/sae")
    """Folder for the results: dictionaries/SITE.LAYER, folders that SAELens loads, and results.json. A stopped run with
    the same options continues there."""


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    args.check_loop()
    args.check_seeds()
    train, held_out = (
        list(itertools.chain(*load_tasks(args.task, split=split, limit=limit, options=args).values()))
        for split, limit in (("train", args.limit), ("test", args.eval_limit))
    )
    check_disjoint(train, held_out)
    if not args.images:
        train, held_out = ([example.without_images() for example in part] for part in (train, held_out))
    data: dict[str, Any] = {
        split: {name: source(name, split=split, options=args) for name in args.task} for split in ("train", "test")
    }
    random, init = args.init == "random", Path(args.init)
    if not random and not (init / "dictionaries").is_dir():
        raise UserError(f"--init {args.init} holds no dictionaries: name the --out of a train.sae, or random")
    examples = [*train, *held_out]
    run, model, processor = start(args, examples, data, check=args.check_activations, ignored=WATCHING, shown=held_out)
    begin = None if random else begin_with(init, places_of(args, model), args.seeds)
    run.pin("init", None if random else dictionaries_digest(init))
    chosen = None if begin is None else {place: stored.dictionary for place, stored in begin.items()}
    stage = Stage(run, "", args, args.model, model, processor, train, held_out, chosen)
    show(stage.measured(stage.dictionaries()))
    print(f"{time.perf_counter() - started:.0f} s; the dictionaries are in {run.folder / 'dictionaries'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
