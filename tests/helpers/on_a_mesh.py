"""Run by test_sharding.py in a process of its own, on eight virtual devices: what one device computes, and a mesh.

Prints, per job, how far the two are apart; and how far a run is that must differ.
"""

import functools
import json

import jax
import numpy as np

import vlm_jax
from interventions.dictionary import Dictionary
from interventions.editing.editors import init_editors
from interventions.placement.adapters import init_lora, lowest_layer, pad
from interventions.trace.causal import causal_trace
from tests.helpers.gradients import value_and_grad
from train import dictionaries as training
from train import editors, trunk
from train.adapter import adapter_label
from train.objective import model_loss
from train.subsets import ByPart, split
from vlm_jax.data import load_task
from vlm_jax.families import FAMILIES
from vlm_jax.mesh.sharding import constrain, make_mesh, placed
from vlm_jax.prompts import Fitted, encode, positions
from vlm_jax.registers import Registers

assert jax.device_count() == 8
jax.config.update("jax_default_matmul_precision", "highest")
MESHES = {
    "mini-qwen3-vl": ("data=2,fsdp=2,tensor=2",),
    "mini-gemma3": ("data=2,fsdp=2,tensor=2",),
}


def trace(model, batch, noise):
    found = causal_trace(model, batch.inputs, batch.spans["question"], batch.spans["answer"], noise=noise)
    return [found.ie, found.te, found.p_clean]


def lora(model, batch, seed=0):
    adapter = init_lora(model, ["L1-attn", "L3-mlp"], r=4, alpha=16.0, dropout=0.0, key=jax.random.key(seed))
    adapter = adapter.replace(weights={site: (a, 0.1 + b) for site, (a, b) in adapter.weights.items()})
    adapter = pad(adapter, model, 2)
    trained, rest = split(trunk.Adapted(model, adapter, lowest_layer(adapter)), adapter_label)
    data = trunk.trunk(model, batch, lowest_layer(adapter))
    value, grads = jax.jit(value_and_grad(trunk.adapter_loss))(trained, rest, data, jax.random.key(0))
    return [value, *jax.tree.leaves(grads)]


def edited(model, batch, seed=0):
    """The editors' loss and its gradients."""
    begun = init_editors(model, layers=[1, 3], blocks=[1], key=jax.random.key(seed))
    trained, rest = split(editors.Edited.of(model, begun), editors.editor_label)
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    data = Fitted(batch.inputs.turned(), index, valid, editors.edited_tokens(begun)(batch))
    value, grads = jax.jit(value_and_grad(editors.editor_loss))(trained, rest, data, jax.random.key(0))
    return [value, *jax.tree.leaves(grads)]


def dictionaries(seed=0):
    """The members' losses and gradients, as many as devices, each on one of them."""
    rng = np.random.default_rng(seed)
    decoder = rng.standard_normal((8, 96, 64), np.float32)
    biases = np.zeros((8, 96), np.float32), np.zeros((8, 64), np.float32)
    one = Dictionary(decoder.swapaxes(1, 2).copy(), biases[0], decoder, biases[1], architecture="topk", k=5)
    params = placed(training.Members(one, np.arange(8, dtype=np.int32), np.ones(8, np.float32)), "batch")
    counters = {"idle": np.zeros((8, 96), np.int32), "fired": np.zeros((8, 96), np.float32)}
    counters |= {"steps": np.zeros(8, np.int32), "threshold": np.zeros(8, np.float32)}
    counters, loss = placed(counters, "batch"), training.DictionaryLoss("topk", 5, 8, 0, 0.1)
    batch = {"site": placed(rng.standard_normal((8, 32, 64), np.float32), "batch")}

    def total(dictionary):
        losses, *_ = loss(params.replace(dictionary=dictionary), batch, jax.random.key(0), counters)
        return losses.sum(), losses

    (_, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params.dictionary)
    return [losses, *jax.tree.leaves(grads)]


def registered(model, examples, processor, mask="register"):
    """Losses and gradients of a model with registers behind its images, and what it writes without the pictures."""
    token = processor.tokenizer.convert_tokens_to_ids(FAMILIES[model.config.family].chat.image_end)
    own = model.with_registers(Registers(2, token, mask))
    batch = encode(examples, processor, own.config)
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    data = Fitted(batch.inputs.turned(), index, valid)
    trained, rest = split(own, ByPart(("text",)))
    value, grads = jax.jit(value_and_grad(model_loss))(trained, rest, data, jax.random.key(0))
    prompts = encode(examples, processor, own.config, with_answer=False).inputs
    return [value, *jax.tree.leaves(grads), 1 + vlm_jax.generate(own, prompts, 4, drop_images=True)]


def generated(model, batch):
    return [vlm_jax.generate(model, batch.inputs, 6)]


def autoencoder(seed=0):
    """The loss of a sparse autoencoder as wide as they come, and its gradients: rows and features apart."""
    rng = np.random.default_rng(seed)
    x = placed(rng.normal(size=(256, 64)).astype(np.float32), "batch")
    encoder = placed(rng.normal(size=(64, 8192)).astype(np.float32), "embed", "mlp")
    decoder = placed(rng.normal(size=(8192, 64)).astype(np.float32), "mlp", "embed")

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(encoder, decoder):
        features = constrain(jax.nn.relu(x @ encoder - 8), "batch", "mlp")
        return ((features @ decoder / 64 - x) ** 2).mean() + 1e-3 * features.mean()

    value, grads = loss(encoder, decoder)
    return [value, *grads]


def jobs(model, batch, prompts, noise, examples, processor):
    return {
        "registers": registered(model, examples, processor),
        "autoencoder": autoencoder(),
        "dictionaries": dictionaries(),
        "trace": trace(model, batch, noise),
        "lora": lora(model, batch),
        "editors": edited(model, batch),
        "generate": generated(model, prompts),
    }


def apart(job, some, others, each=max):
    """The largest difference, or that of ``each``: of traces in probability, else relative to an array's largest
    value."""
    gaps = []
    for a, b in zip(some, others, strict=True):
        largest = 1 if job == "trace" else np.abs(np.asarray(b)).max()
        assert largest > 0
        gaps.append(float(np.abs(np.asarray(a) - np.asarray(b)).max() / largest))
    return each(gaps)


found = {}
for name, meshes in MESHES.items():
    model, processor = vlm_jax.load(name)
    examples = load_task("mini-docvqa", split="test", limit=8)
    batch = encode(examples, processor, model.config)
    prompts = encode(examples, processor, model.config, with_answer=False)
    shape = (*batch.inputs.input_ids.shape, model.config.text.hidden_size)
    spread = 2 * float(np.std(model.text.embed(batch.inputs.input_ids)))
    noise = spread * np.random.default_rng(0).standard_normal(shape, np.float32)
    one = jax.device_get(jobs(model, batch, prompts, noise, examples, processor))
    turned = prompts._replace(inputs=prompts.inputs.take(np.arange(8)[::-1]))
    other = {
        "trace": trace(model, batch, noise[::-1]),
        "lora": lora(model, batch, seed=1),
        "editors": edited(model, batch, seed=1),
        "autoencoder": autoencoder(1),
        "dictionaries": dictionaries(1),
        "registers": registered(model, examples, processor, "blind"),
    }
    other = jax.device_get({**other, "generate": generated(model, turned)})
    found[f"{name}, another run"] = {job: apart(job, other[job][:2], one[job][:2], min) for job in other}
    for text in meshes:
        mesh = make_mesh(text)
        with jax.set_mesh(mesh):
            sharded, _ = vlm_jax.load(name, mesh=mesh)
            kernel = sharded.text.layers.mlp.gate_proj.kernel[...]
            pieces = {str(shard.index) for shard in kernel.addressable_shards}
            assert len(pieces) == mesh.shape["fsdp"] * mesh.shape["tensor"], (text, pieces)
            many = jax.device_get(jobs(sharded, batch, prompts, noise, examples, processor))
        found[f"{name}, {text}"] = {job: apart(job, many[job], one[job]) for job in one}
print(json.dumps(found))
