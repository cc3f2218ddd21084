"""Our models, under an intervention or without, as a model of lmms-eval, which runs and scores its official tasks.

In an environment that has both packages, ``lmms-eval --model vlm_jax --model_args pretrained=FOLDER,intervention=FILE``
finds this file through the entry point ``lmms_eval.models``. Only then is lmms-eval (which brings torch) imported. The
plugin was written against lmms-eval 0.7.2, but tested only against a stand-in.
"""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval.evaluation import answer
from interventions import Gold, Scores, bind, load_interventions
from interventions.placement.adapters import load_peft, merge
from vlm_jax.configure import configure
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.prompts import PLAIN_PROMPT, batches
from vlm_jax.runs.options import ModelOptions

CLASS = "VLMJax"


def manifest() -> Any:
    """What the entry point gives to lmms-eval: the model's name and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlm_jax", simple_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    """The class that the manifest names. It is made on first use, since its base class belongs to lmms-eval."""
    if name == CLASS:
        return _plugin()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _plugin() -> type:
    from lmms_eval.api.model import lmms

    class VLMJax(lmms):
        """A model of ours in lmms-eval.

        Args (of ``--model_args``):
            pretrained: as ``--model`` of our commands; dtype, min_pixels, max_pixels: as their options.
            adapter: PEFT folder of a LoRA adapter.
            intervention: file of saved interventions; steps: "all" or "prefill".
            max_new_tokens: longest answer, for tasks that do not set it.
        """

        is_simple = True

        def __init__(
            self,
            pretrained: str = "mini-qwen3-vl",
            dtype: str | None = None,
            min_pixels: int | None = None,
            max_pixels: int | None = None,
            adapter: str | None = None,
            intervention: str | None = None,
            steps: str = "all",
            max_new_tokens: int = 128,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,  # lmms-eval gives these two to every model
            device: str | None = None,
        ) -> None:
            super().__init__()
            configure()  # lmms-eval is the command here, and its float32 should be that of our commands
            options = ModelOptions(model=pretrained, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
            self.model, self.processor = options.load()
            if adapter is not None:
                self.model = merge(self.model, load_peft(self.model, Path(adapter)))
            self.interventions = () if intervention is None else load_interventions(intervention)
            self.steps, self.max_new_tokens, self.batch = steps, int(max_new_tokens), int(batch_size)

        def _example(self, row: int, text: str, doc_to_visual, doc_id, task: str, split: str, gold="") -> Example:
            """The images of a request, then its text."""
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or ()
            if any(not hasattr(visual, "convert") for visual in visuals):
                raise UserError(f"task {task} shows something other than images: choose a task about images")
            images = tuple(visual.convert("RGB") for visual in visuals)
            return Example(f"{row}/{task}/{doc_id}", images, text.replace("<image>", "").strip(), (gold,))

        def generate_until(self, requests: list) -> list[str]:
            """Greedy answers, each cut at the stop texts of its task."""
            by_length = defaultdict(list)  # answers of one maximal length are generated together
            for row, request in enumerate(requests):
                options = request.args[1]
                if options.get("temperature") or options.get("do_sample") or options.get("num_beams") not in (None, 1):
                    raise UserError(f"task {request.args[4]} samples or searches beams: vlm_jax answers greedily")
                by_length[int(options.get("max_new_tokens") or self.max_new_tokens)].append(row)
            answers = [""] * len(requests)
            for longest, rows in by_length.items():
                examples = [self._example(r, requests[r].args[0], *requests[r].args[2:]) for r in rows]
                options = {"batch": self.batch, "max_new_tokens": longest, "steps": self.steps, "prompt": PLAIN_PROMPT}
                texts = answer(self.model, self.processor, examples, self.interventions, **options).texts
                for row, text in zip(rows, texts, strict=True):
                    answers[row] = _cut(text, requests[row].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[row].args[:2], answers[row])
            return answers

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            """The log-probability of every continuation, and whether greedy decoding would write it."""
            examples = []
            for row, request in enumerate(requests):
                text, gold, doc_to_visual, doc_id, task, split = request.args
                gold = gold(self.task_dict[task][split][doc_id]) if callable(gold) else gold
                examples.append(self._example(row, text, doc_to_visual, doc_id, task, split, str(gold).strip()))
            results: dict[int, tuple[float, bool]] = {}
            config = self.model.config
            for rows, batch in batches(examples, self.processor, config, self.batch, prompt=PLAIN_PROMPT):
                read = Gold.of(batch.inputs, batch.spans["answer"])
                scores = _read(self.model, batch.inputs, bind(self.interventions, batch), read)
                logp, greedy = np.asarray(scores.logp.sum(-1)), np.asarray(scores.correct)
                results |= {row: (float(logp[i]), bool(greedy[i])) for i, row in enumerate(rows)}
            return [results[row] for row in range(len(requests))]

        def generate_until_multi_round(self, requests: list) -> list[str]:
            raise NotImplementedError("vlm_jax answers one question at a time: choose a task of one round")

    return VLMJax


@jax.jit
def _read(model, inputs, interventions, read: Gold) -> Scores:
    return read(model, model(inputs, interventions, ["text.norm"]).taps["text.norm"], 0)


def _cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first stop text."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
