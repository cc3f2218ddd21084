"""Does a job fit a TPU slice? Its real program, compiled for the slice here, without weights and without a TPU.

python -m train.plan --model Qwen3-VL-4B --job trace --topology v5e:2x4 --mesh data=4,tensor=2
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from interventions.editing.editors import init_editors
from interventions.engine.cost import estimate, head_flops, layers_flops
from interventions.engine.grids import patch_grid
from interventions.engine.read import Gold
from interventions.engine.sweep import block_of, chunk_of, first_layers, shared_prefix, sweep_program
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES, module_names
from interventions.placement.adapters import adapter_parameters, init_lora
from train import edit as train_editors
from train import trunk
from train.loop import State, update
from vlm_jax.checkpoints.leaves import abstract, leaf_name
from vlm_jax.config import Config, with_attention
from vlm_jax.errors import UserError
from vlm_jax.generate import decoding
from vlm_jax.generate import generation_program as generation
from vlm_jax.info import config_of
from vlm_jax.inputs import Inputs
from vlm_jax.mesh.chips import TPUS, Chip
from vlm_jax.mesh.hlo import collectives
from vlm_jax.mesh.sharding import check_mesh, make_mesh, sharding, spec_of
from vlm_jax.model import Model
from vlm_jax.prompts import positions
from vlm_jax.runs.command import command
from vlm_jax.runs.ranges import Range, check_ranges

#: What to change where a job does not fit.
_ADVICE = (
    "split the parameters further (tensor or fsdp in --mesh), take a smaller --batch or --remat full, or more chips"
)
#: Tokens of the question and of the gold answer, at the end of every prompt.
_QUESTION, _ANSWER = 48, 4
#: Tokens that P4's prefix and suffix editors act on, each.
_EDITED = 4
#: For the TPU's library: this is no TPU machine, so there is no metadata server to ask and no chip to keep for oneself.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile a job for a TPU slice that is not here, and say whether it fits: memory per chip, FLOPs, collectives."""

    model: str = "Qwen3-VL-4B"
    """Published name, embedded model, Hugging Face folder or hub id, of which only the config is read."""
    job: Literal["trace", "lora", "editors", "generate"] = "trace"
    """P0's trace of a batch (72 cells on 36 layers); a training step of LoRA; one of P4's editors in every vision block
    and layer; answers to a batch."""
    topology: str = "v5e:2x4"
    """TPU generation and slice: v5e:2x4, v6e:4x4, v5p:2x2x4 ..."""
    mesh: str = "data=8"
    """The slice as axes: data x fsdp x tensor."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the parameters."""
    batch: Annotated[int, Range(least=1)] = 8
    """Samples of a batch, over all chips."""
    length: Annotated[int, Range(least=1)] = 1024
    """Tokens of a prompt with its image and answer."""
    r: Annotated[int, Range(least=1)] = 64
    """Rank of LoRA."""
    k: int | None = None
    """Modules that LoRA is placed in, spread over all layers; all of them by default."""
    remat: Literal["full", "some", "none"] = "some"
    """What LoRA's backward pass computes again (train.lora --help)."""
    max_new_tokens: Annotated[int, Range(least=1)] = 32
    """Longest answer."""
    attention: Literal["xla", "splash"] = "xla"
    """XLA's attention or the splash kernel (train.lora --help)."""
    json: Path | None = None
    """Also write the findings to this file."""


class Job(NamedTuple):
    """A jitted function and its arguments, the model among them; FLOPs of its matmuls, over all chips; how often it
    reads the parameters; and how often a loop in it runs whose count only the running program knows (None: it has
    none)."""

    function: Any
    args: tuple
    kwargs: dict
    flops: float
    reads: float = 1.0
    unknown: float | None = None


def prompts(config: Config, batch: int, length: int) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """Prompts of one image each, and which of their tokens are the question and the answer.

    Raises:
        UserError: if they are too short for an image.
    """
    ids, visual = np.ones((batch, length), np.int32), np.zeros((batch, length), bool)
    pixels: dict = {}
    if config.vision is not None:
        room = length - _QUESTION - _ANSWER - 16
        pixels = config.vision.blank(batch, max(1, room))
        (count,) = set(config.vision.images(**pixels)[1])
        if count > room:
            raise UserError(
                f"--length {length} does not hold the model's {count} visual tokens and a question: give more"
            )
        visual[:, 1 : 1 + count] = True
    elif length <= _QUESTION + _ANSWER:
        raise UserError(f"--length {length} does not hold a question: give more than {_QUESTION + _ANSWER}")
    place = np.arange(length)
    question = np.broadcast_to((length - _ANSWER - _QUESTION <= place) & (place < length - _ANSWER), ids.shape)
    answer = np.broadcast_to(place >= length - _ANSWER, ids.shape)
    return Inputs.from_hf(config, input_ids=ids, mm_token_type_ids=visual, **pixels), question, answer


def tower_flops(model: Model, inputs: Inputs) -> float:
    """Of the vision tower, forward: two a parameter and patch, attention left out."""
    if inputs.images is None:
        return 0.0
    return 2.0 * sum(leaf.size for leaf in jax.tree.leaves(model.visual)) * float(np.sum(inputs.images.patch_mask))


def trace(model: Model, args: Args) -> Job:
    config = model.config.text
    depth = config.num_hidden_layers
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    variants, _ = patch_grid(MODULE_SITES, depth)
    read = Gold.of(inputs, answer)
    noise = Add(jnp.asarray(question, jnp.float32)[..., None])
    how = {"base": (noise,), "clean": ()}
    start = shared_prefix(model, inputs, variants, read, **how)
    chunk = chunk_of(inputs, start, "tpu")
    if block_of(model, inputs, start, len(variants), chunk) < len(variants):
        raise UserError(f"--batch {args.batch} is more than one sweep holds on this mesh: give a smaller one")
    chunk = min(chunk, len(variants))
    # A chunk is run from the first layer in which one of its variants is alive.
    starts = np.sort(np.asarray(first_layers(variants, depth)))
    unknown = np.mean([-(-int((starts <= layer).sum()) // chunk) for layer in range(depth)])
    flops = estimate(model, inputs, variants, read, **how, gold=_ANSWER).flops
    wide = jax.ShapeDtypeStruct((args.batch, args.length, config.hidden_size), jnp.float32)
    features = jax.eval_shape(lambda m: m.features(inputs)[0], model)
    arguments = (model, inputs, (), (noise.replace(value=wide),), variants, read.replace(first=0), features)
    return Job(sweep_program, arguments, {"start": start, "chunk": chunk, "mesh": None}, flops, unknown=float(unknown))


def lora(model: Model, args: Args) -> Job:
    """With modules spread over all layers, the lowest among them: no layer is left out as frozen."""
    every = module_names(model.config.text.num_hidden_layers)
    k = len(every) if args.k is None else args.k
    if not 0 < k <= len(every):
        raise UserError(f"--k is {k}: the model has {len(every)} modules")
    names = [every[i] for i in np.linspace(0, len(every) - 1, k).round().astype(int)]
    adapter = init_lora(model, names, r=args.r, alpha=16.0, dropout=0.05, key=jax.random.key(0))
    padded, frozen = trunk.prepared(model, adapter, k, args.remat)
    tx = trunk.optimiser(2e-4, 1000)
    inputs, _, answer = prompts(model.config, args.batch, args.length)
    index, valid = positions(answer)
    x = jax.ShapeDtypeStruct((args.batch, args.length, model.config.text.hidden_size), args.dtype)
    stack = model.depths["deepstack"]
    data = trunk.Trunk(
        x=x,
        deepstack=jax.ShapeDtypeStruct((args.batch, stack, *x.shape[1:]), args.dtype) if stack else None,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids.swapaxes(0, 1),
        is_image=inputs.is_image,
        index=index,
        valid=valid,
        target=index,
    )
    data = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), data)
    state = State(padded.weights, jax.eval_shape(tx.init, padded.weights))
    adapters = adapter_parameters(model, names, args.r) * args.batch * args.length
    flops = trunk.step_flops(model, 0, args.batch, args.length, _ANSWER) + 6.0 * adapters
    return Job(update, (state, frozen, data, jax.random.key(0)), {"loss": trunk.loss, "tx": tx}, flops, reads=2)


def editors(model: Model, args: Args) -> Job:
    """Of P4's ranks and lengths: 6 in the vision tower and behind the projector, 4 on four tokens at both ends of the
    text."""
    made = jax.eval_shape(lambda: init_editors(model, key=jax.random.key(0)))
    weights = {name: editor.weights for name, editor in made.items()}
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    index, valid = positions(answer)
    ends = {"prefix": question.argmax(1), "suffix": answer.argmax(1) - _EDITED}
    place = np.arange(args.length)
    where = {name: (at[:, None] <= place) & (place < at[:, None] + _EDITED) for name, at in ends.items()}
    data = train_editors.Batch(inputs.turned(), where, index, valid)
    slot = {name: editor.slot for name, editor in made.items()}
    tx = trunk.optimiser(6e-4, 1000)
    state = State(weights, jax.eval_shape(tx.init, weights))
    flops = 2 * (layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * _ANSWER))
    flops += 2 * tower_flops(model, inputs)
    arguments = (state, train_editors.Frozen(model, slot), by_row(data, model), jax.random.key(0))
    return Job(update, arguments, {"loss": train_editors.loss, "tx": tx}, flops, reads=2)


def generate(model: Model, args: Args) -> Job:
    inputs, _, _ = prompts(model.config, args.batch, args.length)
    how, count = decoding(model, args.max_new_tokens), args.max_new_tokens
    flops = layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * count)
    flops += layers_flops(model, args.batch, count - 1, args.length)
    flops += tower_flops(model, inputs)
    kwargs = {"how": how, "sampling": None}
    return Job(generation, (model, inputs, ()), kwargs, flops, reads=count, unknown=count - 1)


JOBS = {"trace": trace, "lora": lora, "editors": editors, "generate": generate}


def abstract_on(config: Config, mesh: jax.sharding.Mesh, dtype: str) -> Model:
    """The model's shapes, and where each parameter lies on the mesh."""

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding(leaf_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(placed, abstract(config))


def by_row(batch, model: Model):
    """A batch's shapes with a leading axis of one micro-batch, its rows split over the model's mesh as
    :func:`vlm_jax.mesh.sharding.placed_rows` splits them."""
    mesh = jax.tree.leaves(model)[0].sharding.mesh

    def place(a):
        spec = PartitionSpec(None, *spec_of(np.shape(a)[:1], ("batch",), dict(mesh.shape)))
        return jax.ShapeDtypeStruct((1, *np.shape(a)), a.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, batch)


def everywhere(tree, mesh: jax.sharding.Mesh):
    """The shapes of all arrays, of which those that have no place yet lie whole on every chip."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(a):
        known = a.sharding if isinstance(a, jax.ShapeDtypeStruct) else None
        a = a if hasattr(a, "dtype") else np.asarray(a)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=known or whole)

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was compiled: bytes are of one chip, FLOPs of all of them. idle: bytes of parameters that the program does
    not read, but a run has beside it (such as the vision tower, once its features are known); reads: how often it reads
    its arguments; collectives: kind -> (how often, bytes received in all)."""

    args: Args
    chips: int
    arguments: int
    idle: int
    temporaries: int
    outputs: int
    flops: float
    reads: float
    collectives: dict[str, tuple[float, float]]
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.idle + self.temporaries + self.outputs

    @property
    def chip(self) -> Chip:
        return TPUS[self.args.topology.partition(":")[0]]

    @property
    def fits(self) -> bool:
        return self.total < self.chip.hbm

    def bounds(self) -> dict[str, float]:
        """Seconds that one batch takes at the least, by what bounds it (roofline): matmuls at the chip's peak, reading
        the arguments, the links."""
        moved = sum(size for _, size in self.collectives.values())
        return {
            "matmuls": self.flops / self.chips / self.chip.flops,
            "memory": self.arguments * self.reads / self.chip.memory,
            "links": moved / self.chip.links,
        }

    def __str__(self) -> str:
        args, gib = self.args, 2**30
        bounds = self.bounds()
        longest = max(bounds, key=bounds.get)
        lines = [
            f"{args.model}, {args.job} on {args.topology} ({self.chips} chips), mesh {args.mesh}: batch {args.batch}, "
            f"{args.length} tokens, {args.dtype}",
            f"  memory per chip  {self.total / gib:.2f} of {self.chip.hbm / gib:.2f} GiB: arguments "
            f"{self.arguments / gib:.2f}, parameters not read {self.idle / gib:.2f}, temporaries "
            f"{self.temporaries / gib:.2f}, results {self.outputs / gib:.2f}",
            f"  matmuls          {self.flops / 1e12:,.1f} TFLOP a batch",
        ]
        for kind, (count, size) in self.collectives.items():
            lines.append(f"  {kind:16s} {count:,.0f} a batch, {size / gib:.3f} GiB received per chip")
        shown = ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in bounds.items())
        lines.append(f"  at the least     {1e3 * bounds[longest]:,.1f} ms a batch ({longest}; in ms: {shown})")
        lines.append(f"  compiled in      {self.seconds:.1f} s")
        lines.append("it fits" if self.fits else f"it does not fit: {_ADVICE}")
        return "\n".join(lines)

    def asdict(self) -> dict:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["args"] = {name: value for name, value in dataclasses.asdict(self.args).items() if name != "json"}
        return {**found, "total": self.total, "fits": self.fits, "bounds": self.bounds()}


def topology(name: str):
    """The devices of a slice that is not here.

    Raises:
        UserError: if there is no such slice, or no compiler for it.
    """
    if name.partition(":")[0] not in TPUS or ":" not in name:
        raise UserError(f"unknown topology {name!r}: give a generation and a slice such as v5e:2x4 ({', '.join(TPUS)})")
    for setting, value in _NO_TPU.items():
        os.environ.setdefault(setting, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("compiling for a TPU needs its compiler: pip install 'vlm-jax[tpu-aot]'") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"no slice {name!r} can be compiled for ({reason}): try one such as v5e:2x4") from None


def compiled(args: Args) -> Plan:
    """Compiles the job for the slice.

    Raises:
        UserError: for a model, slice, mesh or size that cannot be.
    """
    check_ranges(args)
    config = with_attention(config_of(args.model), args.attention)
    devices = topology(args.topology)
    mesh = make_mesh(args.mesh, devices)
    check_mesh(config, mesh)
    if args.batch % (rows := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"--batch {args.batch} cannot be split over data x fsdp = {rows}: give a multiple of it")
    model = abstract_on(config, mesh, args.dtype)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        job = JOBS[args.job](model, args)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        begun = time.perf_counter()
        traced = job.function.trace(*everywhere(job.args, mesh), **job.kwargs)
        try:
            program = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            _, _, reason = " ".join(str(error).split()).partition("RESOURCE_EXHAUSTED: ")
            if not reason:
                raise
            reason = re.split(r"\.(?: |$)", reason)[0]
            raise UserError(
                f"{args.model}, {args.job} does not fit {args.topology} on mesh {args.mesh} ({reason}): {_ADVICE}"
            ) from None
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    return Plan(
        args,
        len(devices),
        memory.argument_size_in_bytes,
        _unread(job.args, traced.jaxpr.jaxpr),
        memory.temp_size_in_bytes,
        # What is written over an argument takes no room of its own.
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        job.flops,
        job.reads,
        collectives(program.as_text(), job.unknown),
        seconds,
    )


def _unread(args: tuple, jaxpr) -> int:
    """Bytes on one chip of the parameters that a program has as arguments and does not read, which jit leaves out."""
    read = {var for equation in jaxpr.eqns for var in equation.invars if not isinstance(var, jax.extend.core.Literal)}
    total = 0
    for leaf, var in zip(jax.tree.leaves(args), jaxpr.invars, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None and var not in read:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


@command(configured=False)
def main(args: Args) -> None:
    plan = compiled(args)
    print(plan)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(plan.asdict(), indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(tyro.cli(Args))
