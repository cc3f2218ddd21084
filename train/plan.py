"""Does a job fit a TPU slice? Compiles its real program for the slice, without weights and without a TPU.

python -m train.plan --model Qwen3-VL-4B --job trace --topology v5e:2x4 --mesh data=4,tensor=2
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterable
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
from interventions.engine.chunks import block_of, chunk_of
from interventions.engine.cost import estimate
from interventions.engine.grids import patch_grid
from interventions.engine.prefix import shared_prefix
from interventions.engine.program import sweep_program
from interventions.engine.read import Gold
from interventions.engine.variants import first_layers
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES, module_names
from interventions.placement.adapters import adapter_parameters, init_lora
from train import edit as train_editors
from train import trunk
from train.objective import adamw, linear
from train.step import Loss, State, Step, update
from train.subsets import Label, partitioned, split
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
from vlm_jax.nn.flops import head_flops, layers_flops, lora_step_flops, vision_flops
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
#: Tells the TPU's library that this is no TPU machine: there is no metadata server to ask and no chip to lock.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile a job for a TPU slice, without a TPU, and say whether it fits: memory per chip, FLOPs, collectives."""

    model: str = "Qwen3-VL-4B"
    """Published name, embedded model, Hugging Face folder or hub id. Only its config is read."""
    job: Literal["trace", "lora", "editors", "generate"] = "trace"
    """P0's trace of a batch (72 cells on 36 layers); a training step of LoRA; one of P4's editors in every vision block
    and layer; answers to a batch."""
    topology: str = "v5e:2x4"
    """TPU generation and slice: v5e:2x4, v6e:4x4, v5p:2x2x4 ..."""
    mesh: str = "data=8"
    """The slice as axes: data x fsdp x tensor."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the parameters."""
    batch: Annotated[int, Range(least=1)] = 8
    """Samples of a batch, over all chips."""
    length: Annotated[int, Range(least=1)] = 1024
    """Tokens of a prompt with its image and answer."""
    r: Annotated[int, Range(least=1)] = 64
    """Rank of LoRA."""
    k: int | None = None
    """How many modules get LoRA, spread over all layers; all of them by default."""
    remat: Literal["full", "some", "none"] = "some"
    """What LoRA's backward pass computes again: see train.lora --help."""
    max_new_tokens: Annotated[int, Range(least=1)] = 32
    """Longest answer."""
    attention: Literal["xla", "splash"] = "xla"
    """XLA's attention or the splash kernel: see train.lora --help."""
    json: Path | None = None
    """Also write the findings to this file."""


class Job(NamedTuple):
    """A jitted function with its arguments, one of which is the model.

    flops: of its matmuls, over all chips. reads: how often it reads the parameters. unknown: how often a loop runs
    whose number of turns is only known when the program runs; None if there is no such loop.
    """

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


def trace(model: Model, args: Args) -> Job:
    config = model.config.text
    depth = config.num_hidden_layers
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    variants, _ = patch_grid(MODULE_SITES, depth)
    read = Gold.of(inputs, answer)
    noise = Add(jnp.asarray(question, jnp.float32)[..., None])
    prompt_runs = {"base": (noise,), "clean": ()}
    start = shared_prefix(model, inputs, variants, read, **prompt_runs)
    chunk = chunk_of(inputs, start, "tpu")
    if block_of(model, inputs, start, len(variants), chunk) < len(variants):
        raise UserError(f"--batch {args.batch} is more than one sweep holds on this mesh: give a smaller one")
    chunk = min(chunk, len(variants))
    # A chunk is run from the first layer in which one of its variants is alive.
    starts = np.sort(np.asarray(first_layers(variants, depth)))
    unknown = np.mean([-(-int((starts <= layer).sum()) // chunk) for layer in range(depth)])
    flops = estimate(model, inputs, variants, read, **prompt_runs, gold=_ANSWER).flops
    wide = jax.ShapeDtypeStruct((args.batch, args.length, config.hidden_size), jnp.float32)
    features = jax.eval_shape(lambda m: m.features(inputs)[0], model)
    arguments = (model, inputs, (), (noise.replace(value=wide),), variants, read.replace(first=0), features)
    return Job(sweep_program, arguments, {"start": start, "chunk": chunk, "mesh": None}, flops, unknown=float(unknown))


def training_step(loss: Loss, params: Any, label: Label, labels: Iterable[str], data: Any, flops: float) -> Job:
    """A step of AdamW on the leaves of ``params`` with these labels. The learning rate does not matter here."""
    tx = partitioned(dict.fromkeys(labels, adamw(linear(1e-4, 1000))), label)
    trained, rest = split(params, label)
    state = State(trained, jax.eval_shape(tx.init, trained))
    # Parameters are read twice: forward and backward.
    return Job(update, (state, rest, data, jax.random.key(0)), {"step": Step(loss, tx)}, flops, reads=2)


def lora(model: Model, args: Args) -> Job:
    """LoRA on modules that are spread over all layers. The lowest layer has one, so that no layer is skipped."""
    every = module_names(model.config.text.num_hidden_layers)
    k = len(every) if args.k is None else args.k
    if not 0 < k <= len(every):
        raise UserError(f"--k is {k}: the model has {len(every)} modules")
    names = [every[i] for i in np.linspace(0, len(every) - 1, k).round().astype(int)]
    adapter = init_lora(model, names, r=args.r, alpha=16.0, dropout=0.05, key=jax.random.key(0))
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
    flops = lora_step_flops(model, 0, args.batch, args.length, _ANSWER, adapter_parameters(model, names, args.r))
    params = trunk.prepared(model, adapter, k, args.remat)
    return training_step(trunk.loss, params, trunk.label, trunk.LABELS, data, flops)


def editors(model: Model, args: Args) -> Job:
    """Editors with P4's ranks and lengths: rank 6 in the vision tower and behind the projector, rank 4 on four tokens
    at both ends of the text."""
    params = train_editors.Edited(model, jax.eval_shape(lambda: init_editors(model, key=jax.random.key(0))))
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    index, valid = positions(answer)
    ends = {"prefix": question.argmax(1), "suffix": answer.argmax(1) - _EDITED}
    place = np.arange(args.length)
    where = {name: (at[:, None] <= place) & (place < at[:, None] + _EDITED) for name, at in ends.items()}
    data = train_editors.Batch(inputs.turned(), where, index, valid)
    flops = 2 * (layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * _ANSWER))
    flops += 2 * vision_flops(model, inputs)
    labels = train_editors.LABELS.values()
    return training_step(train_editors.loss, params, train_editors.label, labels, by_row(data, model), flops)


def generate(model: Model, args: Args) -> Job:
    inputs, _, _ = prompts(model.config, args.batch, args.length)
    options, count = decoding(model, args.max_new_tokens), args.max_new_tokens
    flops = layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * count)
    flops += layers_flops(model, args.batch, count - 1, args.length)
    flops += vision_flops(model, inputs)
    kwargs = {"options": options, "sampling": None}
    return Job(generation, (model, inputs, ()), kwargs, flops, reads=count, unknown=count - 1)


JOBS = {"trace": trace, "lora": lora, "editors": editors, "generate": generate}


def abstract_on(config: Config, mesh: jax.sharding.Mesh, dtype: str) -> Model:
    """The model's shapes, and the sharding of each parameter on the mesh."""

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
    """The shapes of all arrays. Those without a sharding are replicated: every chip holds them whole."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(a):
        known = a.sharding if isinstance(a, jax.ShapeDtypeStruct) else None
        a = a if hasattr(a, "dtype") else np.asarray(a)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=known or whole)

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled program needs: bytes of one chip, FLOPs of all chips.

    idle: bytes of parameters that a run holds and the program does not read, such as the vision tower once its features
    are known. reads: how often the program reads its arguments. collectives: kind -> (how often, bytes received).
    """

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
        return self.total < self.chip.memory_bytes

    def bounds(self) -> dict[str, float]:
        """Lower bounds of the seconds for one batch (roofline): by the matmuls at the chip's peak, by reading the
        arguments from memory, and by the links between chips."""
        moved = sum(size for _, size in self.collectives.values())
        return {
            "matmuls": self.flops / self.chips / self.chip.flops_per_second,
            "memory": self.arguments * self.reads / self.chip.memory_bandwidth,
            "links": moved / self.chip.link_bandwidth,
        }

    def __str__(self) -> str:
        args, gib = self.args, 2**30
        bounds = self.bounds()
        longest = max(bounds, key=bounds.get)
        lines = [
            f"{args.model}, {args.job} on {args.topology} ({self.chips} chips), mesh {args.mesh}: batch {args.batch}, "
            f"{args.length} tokens, {args.dtype}",
            f"  memory per chip  {self.total / gib:.2f} of {self.chip.memory_bytes / gib:.2f} GiB: arguments "
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
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["args"] = {name: value for name, value in dataclasses.asdict(self.args).items() if name != "json"}
        return {**fields, "total": self.total, "fits": self.fits, "bounds": self.bounds()}


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
    """Bytes on one chip of the parameters that a program gets and does not read. jit drops them from its arguments."""
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
