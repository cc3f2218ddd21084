"""The lmms-eval plugin against a stand-in for lmms-eval. tests/peers/test_lmms_eval.py runs it inside lmms-eval."""

import abc
import dataclasses
import importlib
import sys
import tomllib
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from eval.evaluation import answer
from interventions import Gate, save_interventions
from vlm_jax.data import Example, load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import PLAIN_PROMPT, encode

ROOT = Path(__file__).parents[2]


class Base(abc.ABC):
    """What lmms_eval.api.model.lmms asks of a model."""

    def __init__(self):
        self.cache_hook, self.task_dict = types.SimpleNamespace(add_partial=lambda *_: None), {}

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture(scope="module")
def plugin():
    """The class as lmms-eval finds it: entry point -> manifest -> class path -> class."""
    with pytest.MonkeyPatch.context() as patch:
        for name, content in {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.instance": {},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
        (target,) = points.values()
        module, _, function = target.partition(":")
        manifest = getattr(importlib.import_module(module), function)()
        assert isinstance(manifest, ModelManifest) and [manifest.model_id] == list(points)
        module, _, name = manifest.simple_class_path.rpartition(".")
        yield getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def docs():
    """Questions of two lengths, about an image each, and one about none."""
    examples = load_task("mini-docvqa", split="test", limit=3) + load_task("mini-aokvqa", split="test", limit=1)
    return [*examples, Example("text", (), "What is the home of who?", ("cave",))]


def request(number: int, text: str, second) -> types.SimpleNamespace:
    """An instance with lmms-eval's six arguments."""
    return types.SimpleNamespace(args=(text, second, lambda doc: list(doc.images), number, "task", "test"))


def lent(plugin, docs, **options):
    model = plugin(pretrained="mini-qwen3-vl", batch_size="4", device="cpu", **options)
    model.task_dict = {"task": {"test": docs}}
    return model


@pytest.fixture(scope="module")
def base(plugin, docs):
    return lent(plugin, docs)


def test_imports_without_lmms_eval():
    assert "lmms_eval" not in sys.modules
    module = importlib.import_module("eval.lmms_eval_plugin")
    with pytest.raises(ModuleNotFoundError, match="lmms_eval"):
        module.VLMJax  # noqa: B018
    with pytest.raises(AttributeError, match="Other"):
        module.Other  # noqa: B018


def test_generate_until(plugin, base, docs, tmp_path):
    """Our own answers, in the requests' order, whatever lengths are asked for; others under an intervention."""
    save_interventions(tmp_path / "cut.safetensors", (Gate.cut(8, [1]),))
    lengths = [6, 3, 6, 6, 6]
    requests = [
        request(i, f"<image>\n{doc.question}", {"max_new_tokens": n, "temperature": 0, "do_sample": False})
        for i, (doc, n) in enumerate(zip(docs, lengths, strict=True))
    ]
    texts = base.generate_until(requests)
    for n in (3, 6):
        part = [doc for doc, length in zip(docs, lengths, strict=True) if length == n]
        ours = answer(base.model, base.processor, part, batch=4, max_new_tokens=n, prompt=PLAIN_PROMPT).texts
        assert [t for t, length in zip(texts, lengths, strict=True) if length == n] == ours
    assert lent(plugin, docs, intervention=tmp_path / "cut.safetensors").generate_until(requests) != texts
    stop = texts[0][1]
    requests[0].args[1]["until"] = ["", "\n\n", stop]
    requests.append(requests[2])  # a request may be repeated
    assert base.generate_until(requests) == [texts[0].split(stop)[0].strip(), *texts[1:], texts[2]]


@pytest.mark.parametrize(
    "text, question",
    [("Is <image> red?", "Is <image> red?"), ("<image> or <image>?", "or ?"), ("<image 1> is?\n", "<image 1> is?")],
)
def test_places_of_images(base, docs, text, question):
    """A mark is the image's place, if there is one for each."""
    *_, doc_to_visual, doc_id, task, split = request(0, text, {}).args
    assert base._example(0, text, doc_to_visual, doc_id, task, split).question == question


def test_loglikelihood(base, docs):
    """The loss: minus the mean of the continuation's log-probabilities in the whole model's logits."""
    golds = [docs[0].answers[0], "harbor forest", "7"]
    requests = [request(i, docs[i].question, f" {gold}") for i, gold in enumerate(golds)]
    requests.append(request(3, docs[3].question, lambda doc: doc.answers[0]))
    found = base.loglikelihood(requests)
    docs = [dataclasses.replace(d, answers=(g,)) for d, g in zip(docs, [*golds, docs[3].answers[0]], strict=False)]
    batch = encode(docs, base.processor, base.model.config, prompt=PLAIN_PROMPT)
    logits = np.asarray(jax.jit(lambda m, x: m(x).logits)(base.model, batch.inputs), np.float64)
    for row, (loss, greedy) in enumerate(found):
        places = np.flatnonzero(batch.spans["answer"][row])
        tokens = np.asarray(batch.inputs.input_ids)[row, places]
        before = logits[row, places - 1]
        each = before - np.log(np.exp(before).sum(-1, keepdims=True))
        np.testing.assert_allclose(loss, -each[np.arange(len(tokens)), tokens].mean(), atol=1e-4)
        assert greedy == (each.argmax(-1) == tokens).all()
    assert {greedy for _, greedy in found} == {True, False}


def test_what_it_cannot_do_is_refused(base):
    with pytest.raises(UserError, match="greedily"):
        base.generate_until([request(0, "What?", {"temperature": 0.7})])
    with pytest.raises(NotImplementedError, match="one round"):
        base.generate_until_multi_round([])
    video = types.SimpleNamespace(args=("What?", {}, lambda doc: ["film.mp4"], 0, "task", "test"))
    with pytest.raises(UserError, match="something other than images"):
        base.generate_until([video])
