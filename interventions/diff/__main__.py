"""P2's second half: which latents of a dictionary learnt to see, which are spatial, what drives them, what they do.

python -m interventions.diff --base runs/sae-text --adapted runs/sae --model mini-llava --out runs/diff
"""

import tyro

from interventions.diff.ablation import truths
from interventions.diff.compare import Compared, Comparison, dictionaries_digest
from interventions.diff.dictionaries import load_dictionaries
from interventions.diff.options import Args
from interventions.diff.report import show
from interventions.diff.selection import large_enough
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import source
from vlm_jax.runs.command import command
from vlm_jax.runs.startup import load_tasks, start


@command
def main(args: Args) -> None:
    folders = args.folders()
    (spatial,), (neutral,) = (
        load_tasks((name,), split=args.split, limit=args.limit, options=args).values()
        for name in (args.task, args.neutral)
    )
    truths([*spatial, *neutral])
    spatial = large_enough(spatial)
    compared = Compared(**{name: load_dictionaries(folder) for name, folder in folders.items()})
    data = {name: source(name, split=args.split, options=args) for name in (args.task, args.neutral)}
    run, model, processor = start(args, [*spatial, *neutral], data, check=compared.check, with_answer=False)
    if args.text_model is not None:
        text_model = args.load_model(args.text_model)
        run.pin("text_model", fingerprint(text_model[0]))
    else:
        text_model = None
    model, acting = args.applied(run, model, args.model)
    run.pin("dictionaries", {name: dictionaries_digest(folder) for name, folder in folders.items()})
    show(Comparison(run, "", args, model, processor, text_model, compared, spatial, neutral, acting).results())
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
