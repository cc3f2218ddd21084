"""What trainings on a mixture of tasks share: their data, and the scores of every task before and after."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.evaluation import evaluate
from eval.judging import check_metric
from interventions.statistics import accuracy, change_text, interval_text, paired
from vlm_jax import Model
from vlm_jax.data import Example, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.processor import Processor
from vlm_jax.runs.folder import Run
from vlm_jax.runs.startup import load_tasks
from vlm_jax.sites import Intervention


class MixedData(NamedTuple):
    """The examples of a training on a mixture of tasks."""

    mixture: dict[str, list[Example]]
    """Task -> the examples that are trained on."""
    tasks: dict[str, list[Example]]
    """Task -> the held-out examples that are scored."""
    sources: dict[str, dict]
    """Where both come from, for the manifest."""

    @classmethod
    def read(cls, args: Any) -> "MixedData":
        """The data of a command's options, which are a :class:`train.mixture.MixtureOptions` with ``eval`` and
        ``eval_limit``.

        Raises:
            UserError: if held-out examples are also trained on, or if the metric cannot score them.
        """
        mixture, evaluated = args.mixture(args), args.eval or args.train
        tasks = load_tasks(evaluated, split="test", limit=args.eval_limit, options=args)
        sources = {"train": args.sources(args)}
        sources["test"] = {name: source(name, split="test", options=args) for name in evaluated}
        data = cls(mixture, tasks, sources)
        check_disjoint(data.train, data.tested)
        check_metric(data.tested, args)
        return data

    @property
    def train(self) -> list[Example]:
        return list(itertools.chain(*self.mixture.values()))

    @property
    def tested(self) -> list[Example]:
        return list(itertools.chain(*self.tasks.values()))


def score_tasks(
    run: Run,
    when: str,
    tasks: Mapping[str, list[Example]],
    model: Model,
    processor: Processor,
    args: Any,
    interventions: Sequence[Intervention] = (),
) -> dict[str, dict]:
    """Task -> the scores of a model's answers (:func:`eval.evaluation.evaluate`), kept in the run folder under
    ``when``."""
    scores = {}
    for task, examples in tasks.items():
        name = f"{task} {when}"
        how: dict[str, Any] = {"interventions": interventions, "title": name, "label": name}
        folder = f"{when}/{task}/"
        scores[task] = evaluate(run, folder, model, processor, examples, args, args.answering, **how)
    return scores


def compared(scores: Mapping[str, Mapping[str, dict]], before: str = "before", after: str = "after") -> dict[str, dict]:
    """Task -> its mean score, with interval, at each time, and the change from ``before`` to ``after``.

    Args:
        scores: time -> the result of :func:`score_tasks`.
    """
    return {
        task: {
            **{when: accuracy(of[task]["scores"], clusters=last["clusters"]) for when, of in scores.items()},
            "change": paired(last["scores"], scores[before][task]["scores"], clusters=last["clusters"]),
            "samples": last["samples"],
        }
        for task, last in scores[after].items()
    }


def show_tasks(tasks: Mapping[str, dict], times: Sequence[str]) -> None:
    """Prints a line for each task: the scores at the ``times``, the last one and the change with their intervals."""
    print(f"{'task':20s}" + "".join(f"{when:10s}" for when in times[:-1]) + f"{times[-1] + ' [95 %]':24s}change [95 %]")
    for task, found in tasks.items():
        earlier = "".join(f"{found[when]['mean']:<10.3f}" for when in times[:-1])
        last, change = found[times[-1]], found["change"]
        print(f"{task:20s}{earlier}{interval_text(last):24s}{change_text(change)}  ({found['samples']} samples)")
