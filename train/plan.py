"""Tells whether a job fits a TPU slice. It compiles the job's real program for the slice, without weights or a TPU.

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

from interventions.dictionary import Dictionary
from interventions.editing.editors import EDITORS, init_editors
from interventions.engine.bundles import bundled
from interventions.engine.cost import estimate
from interventions.engine.grids import patch_grid
from interventions.engine.prefix import shared_prefix
from interventions.engine.program import sweep_program
from interventions.engine.read import Gold
from interventions.engine.variants import first_layers
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES, module_names
from interventions.placement.adapters import adapter_parameters, init_lora
from train import trunk
from train.adapter import ADAPTER_LABELS, adapter_label
from train.dictionaries import DictionaryLoss, Members, member_label, unit_decoder
from train.editors import EDITOR_LABELS, Edited, editor_label, editor_loss
from train.objective import adamw, linear_decay
from train.step import Loss, State, Step, update
from train.subsets import Label, partitioned, split
from vlm_jax.checkpoints.leaves import abstract, leaf_name
from vlm_jax.checkpoints.precision import Precision
from vlm_jax.config import Config, with_attention, with_registers
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
from vlm_jax.prompts import Fitted, positions
from vlm_jax.runs.command import command
from vlm_jax.runs.ranges import BATCH, Range, check_ranges

#: What a user can change if a job does not fit.
_ADVICE = (
    "split the parameters further (tensor or fsdp in --mesh), take a smaller --batch or --remat full, or more chips"
)
#: Numbers of tokens of the question and of the gold answer, which are at the end of every prompt.
_QUESTION, _ANSWER = 48, 4
#: Number of tokens on which each of P4's prefix and suffix editors acts.
_EDITED = 4
#: Environment variables that tell the TPU library that this machine has no TPU, so that it asks no metadata server and
#: locks no chip.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile a job for a TPU slice, without a TPU, and print whether it fits.

    The result also has the memory of each chip, the FLOPs of a batch, the data that chips exchange, and a lower bound
    on the time. P0 and P4 are papers that README.md names.
    """

    model: str = "Qwen3-VL-4B"
    """The model: a published name, an embedded model, a Hugging Face folder or a hub id. Only its config is read."""
    job: Literal["trace", "lora", "edit", "generate", "sae"] = "trace"
    """What to compile for one batch. trace: P0's causal trace, one run for each layer and module; lora: a training step
    of LoRA; edit: a training step of P4's editors, with one in every vision block and layer; generate: answers to
    questions; sae: a training step of P2's dictionaries, one for the residual stream of every layer, without the model
    itself."""
    topology: str = "v5e:2x4"
    """TPU generation and shape of the slice: v5e:2x4, v6e:4x4, v5p:2x2x4 ..."""
    mesh: str = "data=8"
    """How the slice is divided, such as data=2,fsdp=2,tensor=2. The product must be the number of chips. data and fsdp
    split the batch, fsdp also splits the parameters, tensor splits attention heads and MLPs."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the parameters."""
    weights: Literal["bfloat16"] | None = None
    """bfloat16: with --dtype float32, the matrices are bfloat16 and everything else is float32."""
    batch: Annotated[int, BATCH] = 8
    """Samples in a batch, over all chips; for --job sae tokens, which every dictionary reads."""
    length: Annotated[int, Range(least=1)] = 1024
    """Tokens in a prompt, with its image and answer."""
    r: Annotated[int, Range(least=1)] = 64
    """Rank of LoRA, for --job lora."""
    k: Annotated[int | None, Range(least=1)] = None
    """For --job lora: number of modules (a layer's attention or MLP) that get LoRA, spread over all layers; by default
    all of them. For --job sae: number of latents that are active in a token; by default 50."""
    latents: Annotated[int, Range(least=1)] = 32_768
    """Number of latents of a dictionary, for --job sae."""
    remat: Literal["full", "some", "none"] = "some"
    """Which activations LoRA's backward pass computes again instead of storing them. full: all of a layer's, which
    needs the least memory; some: all except two wide ones of the MLP; none: only the cheap ones."""
    max_new_tokens: Annotated[int, Range(least=1)] = 32
    """Largest number of tokens in an answer, for --job generate."""
    attention: Literal["xla", "splash"] = "xla"
    """The program that computes the text's attention. xla: the compiler's own; splash: a TPU kernel that never stores
    the attention scores."""
    json: Path | None = None
    """Also write the result to this JSON file."""


class Job(NamedTuple):
    """A jitted function and its arguments, which include the model.

    flops: FLOPs of its matmuls, over all chips. reads: how many times it reads the parameters. unknown: the number of
    turns of the loop whose number of turns the program itself only learns when it runs; None without such a loop.
    """

    function: Any
    args: tuple
    kwargs: dict
    flops: float
    reads: float = 1.0
    unknown: float | None = None


def prompts(config: Config, batch: int, length: int) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """Prompts with one image each, and masks ``(B, T)`` of the tokens of the question and of the answer.

    Raises:
        UserError: if ``length`` is too short for an image and a question.
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
    position = np.arange(length)
    question = np.broadcast_to((length - _ANSWER - _QUESTION <= position) & (position < length - _ANSWER), ids.shape)
    answer = np.broadcast_to(position >= length - _ANSWER, ids.shape)
    return Inputs.from_hf(config, input_ids=ids, mm_token_type_ids=visual, **pixels), question, answer


def trace_job(model: Model, args: Args) -> Job:
    """P0's causal trace of one batch."""
    config = model.config.text
    depth = config.num_hidden_layers
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    variants, _ = patch_grid(MODULE_SITES, depth)
    read = Gold.of(inputs, answer)
    noise = Add(jnp.asarray(question, jnp.float32)[..., None], site="text.embeddings")
    prompt_runs = {"base": (noise,), "clean": ()}
    start = shared_prefix(model, inputs, variants, read, **prompt_runs)
    bundles, *others = bundled(model, inputs, variants, start, backend="tpu")
    if others:
        raise UserError(f"--batch {args.batch} is more than one sweep holds on this mesh: give a smaller one")
    (chunk,) = (bundle.chunk for bundle in bundles)  # these patches act on all tokens
    # A chunk runs from the first layer in which one of its variants differs from the base run.
    starts = np.sort(np.asarray(first_layers(variants, depth)))
    unknown = np.mean([-(-int((starts <= layer).sum()) // chunk) for layer in range(depth)])
    flops = estimate(model, inputs, variants, read, **prompt_runs, gold=_ANSWER).flops
    wide = jax.ShapeDtypeStruct((args.batch, args.length, config.hidden_size), jnp.float32)
    features = jax.eval_shape(lambda m: m.features(inputs)[0], model)
    arguments = (model, inputs, (), (noise.replace(value=wide),), bundles, read.replace(first=0), features)
    return Job(sweep_program, arguments, {"start": start, "mesh": None}, flops, unknown=float(unknown))


def training_step(loss: Loss, params: Any, label: Label, labels: Iterable[str], data: Any, flops: float) -> Job:
    """A step of AdamW on the leaves of ``params`` that have these labels. The learning rate does not change the
    program."""
    tx = partitioned(dict.fromkeys(labels, adamw(linear_decay(1e-4, 1000))), label)
    trained, rest = split(params, label)
    state = State(trained, jax.eval_shape(tx.init, trained))
    # Parameters are read twice: forward and backward.
    return Job(update, (state, rest, data, jax.random.key(0)), {"step": Step(loss, tx)}, flops, reads=2)


def lora_job(model: Model, args: Args) -> Job:
    """A training step of LoRA on modules that are spread over all layers. The lowest layer has one, so every layer is
    run."""
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
        tokens=inputs.tokens,
        position_ids=inputs.position_ids.swapaxes(0, 1),
        index=index,
        valid=valid,
        target=index,
    )
    data = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), data)
    flops = lora_step_flops(model, 0, args.batch, args.length, _ANSWER, adapter_parameters(model, names, args.r))
    params = trunk.prepared(model, adapter, k, args.remat)
    return training_step(trunk.adapter_loss, params, adapter_label, ADAPTER_LABELS, data, flops)


def edit_job(model: Model, args: Args) -> Job:
    """A training step of editors with P4's sizes: rank 6 in the vision tower and behind the projector, and rank 4 on
    the first four and the last four tokens of the text."""
    params = Edited.of(model, init_editors(model, length=_EDITED, key=jax.random.key(0)))
    params = params.replace(editors=jax.eval_shape(lambda: params.editors))
    inputs, question, answer = prompts(model.config, args.batch, args.length)
    index, valid = positions(answer)
    ends = {"prefix": question.argmax(1), "suffix": answer.argmax(1) - _EDITED}
    position = np.arange(args.length)
    where = {name: (at[:, None] <= position) & (position < at[:, None] + _EDITED) for name, at in ends.items()}
    where["cross"] = np.zeros(answer.shape, bool) if inputs.is_image is None else np.asarray(inputs.is_image)
    data = Fitted(inputs.turned(), index, valid, where)
    flops = 2 * (layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * _ANSWER))
    flops += 2 * vision_flops(model, inputs)
    labels = [EDITOR_LABELS[name] for name in EDITORS]
    return training_step(editor_loss, params, editor_label, labels, by_row(data, model), flops)


def generate_job(model: Model, args: Args) -> Job:
    """Greedy answers to one batch."""
    inputs, _, _ = prompts(model.config, args.batch, args.length)
    options, count = decoding(model, args.max_new_tokens), args.max_new_tokens
    flops = layers_flops(model, args.batch, args.length) + head_flops(model, args.batch * count)
    flops += layers_flops(model, args.batch, count - 1, args.length)
    flops += vision_flops(model, inputs)
    kwargs = {"options": options, "sampling": None}
    return Job(generation, (model, inputs, ()), kwargs, flops, reads=count, unknown=count - 1)


def sae_job(model: Model, args: Args) -> Job:
    """A training step of TopK dictionaries of the residual stream of every layer. The mesh divides them among the
    chips."""
    depth, width = model.depths["text"], model.config.text.hidden_size
    mesh, k = jax.tree.leaves(model)[0].sharding.mesh, 50 if args.k is None else args.k
    if not 0 < k <= args.latents:
        raise UserError(f"--k is {k}: a dictionary has {args.latents} latents")

    def member(*shape: int, dtype: Any = jnp.float32, axis: int = 0) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*(None,) * axis, *spec_of(shape[axis : axis + 1], ("batch",), dict(mesh.shape)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    sizes = {
        "W_enc": (width, args.latents),
        "b_enc": (args.latents,),
        "W_dec": (args.latents, width),
        "b_dec": (width,),
    }
    dictionary = Dictionary(**{name: member(depth, *shape) for name, shape in sizes.items()}, architecture="topk", k=k)
    params = Members(dictionary, member(depth, dtype=jnp.int32), member(depth))
    counters = {name: member(depth, args.latents, dtype=t) for name, t in (("idle", jnp.int32), ("fired", jnp.float32))}
    counters |= {"steps": member(depth, dtype=jnp.int32), "threshold": member(depth)}
    tx = partitioned({"dictionary": adamw(linear_decay(1e-4, 1000))}, member_label)
    trained, rest = split(params, member_label)
    loss = DictionaryLoss("topk", k, min(args.latents, width // 2), 10_000_000, 0.05)
    step = Step(loss, tx, unit_decoder, depth)
    state = jax.eval_shape(step.begin, trained, counters)
    state = jax.tree.map(lambda a: member(*a.shape, dtype=a.dtype), state)
    step = dataclasses.replace(step, places=tuple(leaf.sharding for leaf in jax.tree.leaves(state)))
    data = {"text.resid_post": member(1, depth, args.batch, width, axis=1)}
    # Products of tokens x width x latents: the encoder's output and gradient; the decoder's, and that of its input;
    # and the decoder's three once more for the dead latents.
    flops = 8 * 2.0 * depth * args.batch * width * args.latents
    return Job(update, (state, rest, data, jax.random.key(0)), {"step": step}, flops, reads=2)


#: Value of --job -> the function that builds the job.
JOBS = {"trace": trace_job, "lora": lora_job, "edit": edit_job, "generate": generate_job, "sae": sae_job}


def abstract_on(config: Config, mesh: jax.sharding.Mesh, precision: Precision) -> Model:
    """The model with a shape, a dtype and a sharding on the mesh in place of each parameter."""

    def placed(path, leaf):
        name = leaf_name(path)
        return jax.ShapeDtypeStruct(leaf.shape, precision.of_leaf(name), sharding=sharding(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(placed, abstract(config))


def by_row(batch, model: Model):
    """The shapes of a batch's arrays, with a leading axis of one micro-batch. The rows are split over the model's mesh
    in the same way as :func:`vlm_jax.mesh.sharding.placed_rows` splits them."""
    mesh = jax.tree.leaves(model)[0].sharding.mesh

    def place(a):
        spec = PartitionSpec(None, *spec_of(np.shape(a)[:1], ("batch",), dict(mesh.shape)))
        return jax.ShapeDtypeStruct((1, *np.shape(a)), a.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, batch)


def with_shardings(tree, mesh: jax.sharding.Mesh):
    """The shapes of all arrays, each with a sharding. Arrays without one are replicated: every chip holds a copy."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(a):
        known = a.sharding if isinstance(a, jax.ShapeDtypeStruct) else None
        a = a if hasattr(a, "dtype") else np.asarray(a)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=known or whole)

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled program needs. Bytes are those of one chip, FLOPs those of all chips.

    idle: bytes of parameters that a run holds but that the program does not read, such as the vision tower after its
    features were computed. reads: how many times the program reads its arguments. collectives: kind -> (number of
    calls, bytes received). seconds: the time for compiling.
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
        """Lower bounds on the seconds for one batch (the roofline model), by their cause: the matmuls at the chip's
        peak, reading the arguments from memory, and the links between chips."""
        moved = sum(size for _, size in self.collectives.values())
        return {
            "matmuls": self.flops / self.chips / self.chip.flops_per_second,
            "memory": self.arguments * self.reads / self.chip.memory_bandwidth,
            "links": moved / self.chip.link_bandwidth,
        }

    def __str__(self) -> str:
        args, gib = self.args, 2**30
        bounds = self.bounds()
        longest = max(bounds, key=lambda cause: bounds[cause])
        lines = [
            f"{args.model}, {args.job} on {args.topology} ({self.chips} chips), mesh {args.mesh}: batch {args.batch}, "
            f"{args.length} tokens, {args.dtype}" + (f" over {args.weights} weights" if args.weights else ""),
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
    """The devices of a TPU slice, described by the TPU compiler; this machine needs no TPU.

    Raises:
        UserError: if there is no such slice, or the compiler is not installed.
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
        UserError: for an unknown model or slice, a mesh that does not match them, or a job that does not fit.
    """
    check_ranges(args)
    # Registers are text of --length, and a mask costs nothing.
    config = with_attention(with_registers(config_of(args.model), None), args.attention)
    devices = topology(args.topology)
    mesh = make_mesh(args.mesh, devices)
    check_mesh(config, mesh)
    if args.batch % (rows := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"--batch {args.batch} cannot be split over data x fsdp = {rows}: give a multiple of it")
    model = abstract_on(config, mesh, Precision.of(args.dtype, args.weights))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        job = JOBS[args.job](model, args)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        begun = time.perf_counter()
        traced = job.function.trace(*with_shardings(job.args, mesh), **job.kwargs)
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
        # Results that overwrite an argument need no memory besides the argument's.
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        job.flops,
        job.reads,
        collectives(program.as_text(), job.unknown),
        seconds,
    )


def _unread(args: tuple, jaxpr) -> int:
    """Bytes, on one chip, of the parameters that are arguments of the program but are not read. jit removes them from
    the compiled program's arguments."""
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
