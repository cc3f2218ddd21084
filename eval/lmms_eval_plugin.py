"""Makes our models available in lmms-eval, with or without an intervention, so that it can run its official tasks.

In an environment that has both packages, ``lmms-eval --model vlm_jax --model_args pretrained=FOLDER,intervention=FILE``
finds this file through the entry point ``lmms_eval.models``. lmms-eval needs torch, so this file imports it only when
it is used. ``make test-peers`` runs it inside lmms-eval 0.7.3.
"""

import functools
import importlib
from collections import defaultdict
from typing import Any, Literal

import jax
import numpy as np

from eval.evaluation import answer
from interventions import Gold, Scores, bind, load_interventions
from interventions.placement.adapted import merged
from vlm_jax.configure import configure
from vlm_jax.data import Example
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.errors import UserError
from vlm_jax.prompts import PLAIN_PROMPT, batches
from vlm_jax.runs.options import ModelOptions

CLASS = "VLMJax"


def manifest() -> Any:
    """The model's name and the path of its class. lmms-eval calls this function through the entry point."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="vlm_jax", simple_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    """The class that the manifest names. It is made on first use, because its base class is imported from lmms-eval."""
    if name == CLASS:
        return _plugin()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _plugin() -> type:
    base: Any = importlib.import_module("lmms_eval.api.model").lmms

    class VLMJax(base):
        """One of our models, as lmms-eval sees it.

        Args (given with ``--model_args``):
            pretrained: the value of ``--model`` in our commands.
            dtype, weights, min_pixels, max_pixels: as the options of our commands.
            adapter: PEFT folder of an adapter, or several that are added up: FOLDER;FOLDER.
            adapter_weights: by what they are multiplied: WEIGHT;WEIGHT. By default 1.
            intervention: file of saved interventions.
            steps: "all" if they also act on generated tokens, "prefill" if they act on the prompt only.
            max_new_tokens: largest number of tokens in an answer, for tasks that do not set one.
        """

        is_simple = True

        def __init__(
            self,
            pretrained: str = "mini-qwen3-vl",
            dtype: Literal["float32", "bfloat16", "float16"] | None = None,
            weights: Literal["bfloat16"] | None = None,
            min_pixels: int | None = None,
            max_pixels: int | None = None,
            adapter: str | None = None,
            adapter_weights: str | float | None = None,
            intervention: str | None = None,
            steps: Literal["all", "prefill"] = "all",
            max_new_tokens: int = 128,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,  # lmms-eval passes this argument and the next to every model
            device: str | None = None,
        ) -> None:
            super().__init__()
            configure()  # our commands do this too, so both compute with the same float32 precision
            options = ModelOptions(
                model=pretrained, dtype=dtype, weights=weights, min_pixels=min_pixels, max_pixels=max_pixels
            )
            self.model, self.processor = options.load()
            if adapter is not None:
                factors = [] if adapter_weights is None else list(map(float, str(adapter_weights).split(";")))
                self.model = merged(self.model, adapter.split(";"), factors, pretrained)
            self.interventions = () if intervention is None else load_interventions(intervention)
            self.steps, self.max_new_tokens, self.batch = steps, int(max_new_tokens), int(batch_size)

        def _example(self, row: int, text: str, doc_to_visual, doc_id, task: str, split: str, gold="") -> Example:
            """A request as an example: its images, then its text."""
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or ()
            if any(not hasattr(visual, "convert") for visual in visuals):
                raise UserError(f"task {task} shows something other than images: choose a task about images")
            # A task may show one image twice, or mention images in other words; they then come before the text.
            marked = text.count(IMAGE_MARK) == len(visuals)
            text = text if marked else text.replace(IMAGE_MARK, "")
            return Example(f"{row}/{task}/{doc_id}", tuple(visuals), text.strip(), (gold,))

        def generate_until(self, requests: list) -> list[str]:
            """Greedy answers, each cut off at the first stop text of its task."""
            by_length = defaultdict(list)  # requests with the same largest number of new tokens are answered together
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

        def loglikelihood(self, requests: list) -> list:
            """The loss of every continuation, its mean negative log-probability per token, and whether greedy decoding
            would write it.

            Despite the method's name, lmms-eval chooses the answer with the *lowest* number, because the models that it
            comes with return their loss (lmms-eval's issue 370).
            """
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
                loss, greedy = -np.asarray(scores.log_probability), np.asarray(scores.correct)
                results |= {row: (float(loss[i]), bool(greedy[i])) for i, row in enumerate(rows)}
            return [_kept(results[row]) for row in range(len(requests))]

        def generate_until_multi_round(self, requests: list) -> list[str]:
            raise NotImplementedError("vlm_jax answers one question at a time: choose a task of one round")

    return VLMJax


def _kept(pair: tuple[float, bool]) -> Any:
    """A result of ``loglikelihood`` that lmms-eval does not turn into text. 0.7.3 does that to every pair that is not
    in a ``GenerationResult``; earlier versions take the pair itself."""
    instance = importlib.import_module("lmms_eval.api.instance")
    return instance.GenerationResult(pair) if hasattr(instance, "unwrap_generation_output") else pair


@jax.jit
def _read(model, inputs, interventions, read: Gold) -> Scores:
    return read(model, model(inputs, interventions, ["text.norm"]).taps["text.norm"], 0)


def _cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first stop text."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
