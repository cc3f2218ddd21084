"""How much faster the sweep engine traces the whole layer x module grid than one hooked forward pass per cell.

    python benchmarks/sweep.py --figure docs/sweep_speed.png

Both sides run in this process on the same random Qwen3-VL and the same noise: the sweep, and transformers with PyTorch
forward hooks, both with the visual features already computed. The sweep's times are medians of several calls.
The sweep runs in float32, in float32 over bfloat16 weights, and in bfloat16. The hooked grid takes minutes, so it runs
once: all cells in float32, the first ones in bfloat16.
"""

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from lora import machine, torch_device
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vlm_jax
from interventions.engine import bundles
from interventions.engine.cost import estimate
from interventions.engine.grids import each_token, patch_grid
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.kinds.add import Add
from vlm_jax.nn.products import product

SITES = ("text.attn_out", "text.mlp_out")


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the layer x module grid: sweep against transformers with hooks; and how the sweep's time grows."""

    layers: int = 28
    width: int = 1024
    heads: int = 16
    """Query heads."""
    groups: int = 8
    """Key-value heads."""
    head_dim: int = 64
    ffn: int = 3072
    image_tokens: int = 1024
    """Visual tokens, a square number."""
    before: int = 12
    """Text tokens before the image."""
    after: int = 32
    """Question and answer tokens, of which 4 are the answer."""
    repeats: int = 5
    hooked_cells: int | None = None
    """Run only this many cells with hooks and extrapolate; None: all of them."""
    growth: bool = True
    """Also time the sweep at other numbers of image tokens, layers and variants."""
    tokens: int = 8
    """Also time a grid over this many tokens behind the image, each patched by itself, whose variants carry only what
    follows their token; and the same grid where each carries all tokens behind the prefix. 0: neither."""
    figure: Path | None = None
    """Where to draw how the time grows."""


def build(args: Args) -> Qwen3VLForConditionalGeneration:
    quarter = args.head_dim // 8
    sections = [args.head_dim // 2 - 2 * (quarter + quarter // 4), *[quarter + quarter // 4] * 2]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 8192,
            "hidden_size": args.width,
            "intermediate_size": args.ffn,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.groups,
            "head_dim": args.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": args.width,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=8000,
        video_token_id=8001,
        vision_start_token_id=8002,
        vision_end_token_id=8003,
    )
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config).eval()


def prompt(args: Args, image_tokens: int) -> dict:
    """Random tokens around an image of noise, as transformers takes them."""
    rng = np.random.default_rng(0)
    side = 2 * int(image_tokens**0.5)
    ids = rng.integers(0, 8000, (1, args.before + image_tokens + args.after))
    ids[0, args.before : args.before + image_tokens] = 8000
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": (ids == 8000).astype(int),
        "pixel_values": rng.normal(size=(side * side, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, side, side]]),
    }


class Sweep:
    """The grid on one prompt, as a function to call. The call computes everything except for the vision tower."""

    def __init__(self, model, arrays: dict, args: Args, variants=None):
        self.model, depth = model, model.config.text.num_hidden_layers
        self.inputs = jax.device_put(vlm_jax.Inputs.from_hf(model.config, **arrays))
        length = arrays["input_ids"].shape[1]
        question, answer = np.zeros((1, length), bool), np.zeros((1, length), bool)
        question[0, -args.after : -4], answer[0, -4:] = True, True
        noise = 0.05 * np.random.default_rng(1).normal(size=(1, length, args.width)).astype(np.float32)
        self.noise, self.answer = noise * question[..., None], np.flatnonzero(answer[0])
        self.read, self.base = Gold.of(self.inputs, answer), (Add(jnp.asarray(self.noise)),)
        self.variants = patch_grid(SITES, depth)[0] if variants is None else variants
        self.features = jax.jit(lambda model, inputs: model.features(inputs)[0])(model, self.inputs)

    def __call__(self):
        options = {"base": self.base, "clean": (), "features": self.features}
        return sweep_runs(self.model, self.inputs, self.variants, self.read, **options)

    @property
    def cost(self):
        return estimate(self.model, self.inputs, self.variants, self.read, base=self.base, clean=())


class Hooked:
    """The other side: transformers with forward hooks, one decoder pass per cell."""

    def __init__(self, model, arrays: dict, sweep: Sweep, dtype=torch.float32):
        device = torch_device()
        self.model = model.to(device, dtype)
        self.text, self.gold = model.model.language_model, sweep.answer
        tensors = {name: torch.tensor(value, device=device) for name, value in arrays.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
        self.target = tensors["input_ids"][0, self.gold]
        self.modules = [module for layer in self.text.layers for module in (layer.self_attn, layer.mlp)]
        self.kwargs = {}

        def keep(_, args, kwargs):
            self.kwargs = {**kwargs, "use_cache": False}

        handle = self.text.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            model(**tensors)
        handle.remove()
        self.embeds = self.kwargs["inputs_embeds"]
        self.corrupt = self.embeds + torch.tensor(sweep.noise).to(device, dtype)
        self.outputs = {}
        handles = [
            module.register_forward_hook(functools.partial(self.record, i)) for i, module in enumerate(self.modules)
        ]
        self.probability(self.embeds)
        for handle in handles:
            handle.remove()

    def record(self, i, module, args, out):
        self.outputs[i] = out[0] if isinstance(out, tuple) else out

    def probability(self, embeds) -> float:
        with torch.no_grad():
            hidden = self.text(**{**self.kwargs, "inputs_embeds": embeds}).last_hidden_state[:, self.gold - 1]
            logp = torch.log_softmax(self.model.lm_head(hidden).float(), -1)[
                0, torch.arange(len(self.gold)), self.target
            ]
        return float(logp.mean().exp())

    def cell(self, i: int) -> float:
        """The probability in the corrupted run with the clean output of module ``i``."""

        def patch(module, args, out):
            return (self.outputs[i], *out[1:]) if isinstance(out, tuple) else self.outputs[i]

        handle = self.modules[i].register_forward_hook(patch)
        value = self.probability(self.corrupt)
        handle.remove()
        return value


def seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of the next ones."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return times[0], float(np.median(times[1:]))


def matmul_rates(size: int = 2048) -> dict[str, dict[str, float]]:
    """FLOP/s of XLA and of torch on one product of this size, by precision. Sums are float32 in both."""
    rates: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        y = torch.randn(size, size).to(getattr(torch, dtype))
        ours = functools.partial(jax.jit(functools.partial(product, "ij,jk->ik")), x, x)
        sides = {"XLA": ours, "torch": functools.partial(torch.matmul, y, y)}
        rates[dtype] = {name: 2 * size**3 / seconds(side, 9)[1] for name, side in sides.items()}
    return rates


def loaded(args: Args, *names: str) -> tuple[Qwen3VLForConditionalGeneration, dict[str, vlm_jax.Model]]:
    """transformers' model, and ours in these precisions, by default in all. They have the same numbers, which bfloat16
    can hold."""
    hf = build(args)
    with torch.no_grad():
        for parameter in hf.parameters():  # and no buffers, such as the rotary frequencies
            parameter.copy_(parameter.to(torch.bfloat16).float())
    options = {
        "float32": {"dtype": "float32"},
        "float32 over bfloat16 weights": {"dtype": "float32", "weights": "bfloat16"},
        "bfloat16": {"dtype": "bfloat16"},
    }
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(hf).to(torch.bfloat16).save_pretrained(folder)
        return hf, {name: vlm_jax.load(folder, **options[name])[0] for name in names or options}


def cells_of(sweep: Sweep) -> np.ndarray:
    """The answer's probability in every cell, layer by layer."""
    return np.asarray(sweep().variants.probability)[:, 0].reshape(2, -1).T.ravel()


def compare(args: Args, models: dict[str, vlm_jax.Model], hf) -> None:
    arrays = prompt(args, args.image_tokens)
    sweeps = {name: Sweep(model, arrays, args) for name, model in models.items()}
    sweep, cost, count = sweeps["float32"], sweeps["float32"].cost, len(sweeps["float32"].variants)
    rates = matmul_rates()
    print(machine())
    for dtype, by_library in rates.items():
        print(f"{dtype} matmul: " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in by_library.items()))
    print(f"{count} cells, {arrays['input_ids'].shape[1]} tokens, {args.layers} layers, width {args.width}")
    print(f"sweep: {cost}")
    rows, exact = [], None
    for name, one in sweeps.items():
        first, median = seconds(one, args.repeats)
        exact = cells_of(one) if exact is None else exact  # of float32, which comes first
        share = cost.flops / median / rates["bfloat16" if name == "bfloat16" else "float32"]["XLA"]
        rows.append((f"sweep, {name}", first - median, median, np.abs(cells_of(one) - exact).max(), f"{share:.0%}"))
    for dtype in (torch.float32, torch.bfloat16):
        hooked = Hooked(hf, arrays, sweep, dtype)
        run = min(count, args.hooked_cells or count) if dtype is torch.float32 else min(count, 8)
        hooked.cell(0)
        begun = time.perf_counter()
        values = np.array([hooked.cell(i) for i in range(run)])
        spent = (time.perf_counter() - begun) * count / run
        name = f"transformers + hooks, {str(dtype).removeprefix('torch.')}"
        name += f" ({run} cells, extrapolated)" if run < count else ""
        rows.append((name, 0.0, spent, np.abs(values - exact[:run]).max(), "-"))
    print(
        "\n| engine | compilation (s) | grid (s) | times the float32 sweep | of its matmul rate | largest difference |"
    )
    print("|---|---|---|---|---|---|")
    for name, compilation, grid, difference, share in rows:
        print(f"| {name} | {compilation:.1f} | {grid:.2f} | {grid / rows[0][2]:.2f} | {share} | {difference:.1e} |")


def growth(args: Args, model) -> dict[str, list[tuple[int, float]]]:
    """Median seconds of the sweep by image tokens, layers and variants; the others as in the comparison."""
    timings: dict[str, list[tuple[int, float]]] = {"image tokens": [], "layers": [], "variants": []}

    def add(axis: str, at: int, sweep: Sweep) -> None:
        timings[axis].append((at, seconds(sweep, 2)[1]))
        print(f"{axis} {at}: {timings[axis][-1][1]:.2f} s", flush=True)

    for tokens in (64, 256, 1024):
        add("image tokens", tokens, Sweep(model, prompt(args, tokens), args))
    for layers in (args.layers // 4, args.layers // 2):
        less = dataclasses.replace(args, layers=layers)
        add("layers", layers, Sweep(loaded(less, "float32")[1]["float32"], prompt(args, args.image_tokens), less))
    timings["layers"].append((args.layers, timings["image tokens"][-1][1]))
    heads, _ = patch_grid(("text.head_out",), args.layers, heads=args.heads)
    for count in (14, 56, 224, len(heads)):
        rows = np.linspace(0, len(heads) - 1, count).astype(int)
        add("variants", count, Sweep(model, prompt(args, args.image_tokens), args, heads.take(rows)))
    return timings


def token_grid(args: Args, model) -> None:
    """Prints the seconds of a grid over tokens, evenly spaced from the question to the last token that is read."""
    arrays = prompt(args, args.image_tokens)
    length = arrays["input_ids"].shape[1]
    patched = np.zeros((1, length), bool)
    patched[0, np.linspace(length - args.after, length - 2, args.tokens).astype(int)] = True
    variants, _ = patch_grid(SITES, args.layers, tokens=each_token(patched))
    sweep = Sweep(model, arrays, args, variants)
    print(f"\n{len(variants):,} cells: {args.layers} layers, 2 modules, {int(patched.sum())} tokens\n{sweep.cost}")
    print("| a variant carries | compilation (s) | grid (s) | seconds a cell |\n|---|---|---|---|")
    exact = None
    saving = bundles._LEAST_SAVING
    for carries, least in (("what follows its first token", saving), ("every token behind the prefix", 1.0)):
        bundles._LEAST_SAVING = least
        first, median = seconds(sweep, args.repeats)
        values = np.asarray(sweep().variants.probability)
        exact = values if exact is None else exact
        assert np.abs(values - exact).max() < 1e-4
        bundles._LEAST_SAVING = saving
        print(f"| {carries} | {first - median:.1f} | {median:.2f} | {median / len(variants):.4f} |", flush=True)


def draw(path: Path, timings: dict[str, list[tuple[int, float]]], cells: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(timings), figsize=(10, 3), layout="constrained")
    for axis, (name, points) in zip(axes, timings.items(), strict=True):
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "o-")
        axis.set(xlabel=name, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(f"Seconds of one sweep; {cells} cells unless said otherwise")
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    hf, models = loaded(args)
    compare(args, models, hf)
    if args.tokens:
        token_grid(args, models["float32"])
    if args.growth:
        timings = growth(args, models["float32"])
        if args.figure is not None:
            draw(args.figure, timings, 2 * args.layers)


if __name__ == "__main__":
    main(tyro.cli(Args))
