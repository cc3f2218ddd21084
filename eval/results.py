"""Results in the format of lmms-eval and lm-evaluation-harness, so that tools for their files can read ours.

``results.json`` has their keys and ours; ``samples_TASK.jsonl`` has a line for every sample. Dates, timings and the
machine are left out, so that a repeated run writes the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.judging import NEITHER_BETTER, VERSION, Judged, MetricOptions, Summary, metric_name
from vlm_jax.data import Example

#: lmms-eval's name for "no filter". Answers are scored as they are; each metric recognises the answer in the text.
_FILTER = "none"


def lmms_eval_results(
    summaries: Mapping[str, Mapping[str, Summary]],
    samples: Mapping[str, Sequence[dict]],
    *,
    config: dict[str, Any],
    task_config: dict[str, Any],
    original: Mapping[str, int | None],
) -> dict:
    """The top-level keys of lmms-eval's ``results.json``.

    Args:
        summaries: task -> metric -> summary.
        samples: the result of :func:`lmms_eval_samples`.
        config: the model and the options of the run.
        task_config: the settings that all tasks share: prompt, split, decoding, metric options.
        original: task -> its number of samples; None if a limit stopped the reading, so that the number is not known.
    """
    values = {task: {k: v for s in parts.values() for k, v in s.values.items()} for task, parts in summaries.items()}
    better = {task: {name: name not in NEITHER_BETTER or None for name in metrics} for task, metrics in values.items()}
    return {
        "results": {task: {"alias": task, **_keyed(metrics)} for task, metrics in values.items()},
        "configs": {
            task: {
                "task": task,
                **task_config,
                "metric_list": [{"metric": name, "higher_is_better": better[task][name]} for name in metrics],
                "num_fewshot": 0,
                "output_type": "generate_until",
            }
            for task, metrics in values.items()
        },
        "versions": dict.fromkeys(values, VERSION),
        "n-shot": dict.fromkeys(values, 0),
        "higher_is_better": better,
        "n-samples": {task: {"original": original[task], "effective": len(samples[task])} for task in values},
        "config": config,
        "task_hashes": {task: _digest("".join(line["doc_hash"] for line in samples[task])) for task in values},
    }


def _keyed(values: Mapping) -> dict[str, float]:
    keyed = {}
    for name, value in values.items():
        keyed |= {f"{name},{_FILTER}": value.value, f"{name}_stderr,{_FILTER}": value.stderr}
    return keyed


def lmms_eval_samples(
    examples: Sequence[Example], prompts: Sequence[str], answers: Sequence[str], judged: Sequence[Judged], options
) -> dict[str, list[dict]]:
    """Task -> the lines of its ``samples_TASK.jsonl``. Images are not written, but ``doc_hash`` depends on their
    pixels."""
    by_task: dict[str, list[dict]] = {}
    for example, prompt, answer, one in zip(examples, prompts, answers, judged, strict=True):
        lines = by_task.setdefault(example.task, [])
        lines.append(
            {
                "doc_id": len(lines),
                "id": example.id,
                "target": example.answers[0],
                "input": prompt,
                "resps": [answer],
                "filtered_resps": one.read,
                "doc_hash": _hash(example),
                **_scores(example, one, options),
            }
        )
    return by_task


def _scores(example: Example, one: Judged, options: MetricOptions) -> dict[str, float]:
    name = metric_name(example, options)
    return {name: one.score} | {f"{name}_{other}": value for other, value in one.others.items()}


def _hash(example: Example) -> str:
    """A digest of an example's texts and images."""
    parts = [example.id, example.question, example.answers, example.choices, example.gold]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for image in example.images:
        digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(task: str) -> str:
    """A task's name with the characters that a file name cannot have replaced by "_"."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in task)
