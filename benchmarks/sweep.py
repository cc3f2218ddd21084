"""How much faster the sweep engine traces the whole layer x module grid than one hooked forward pass per cell.

    python benchmarks/sweep.py --layers 12 --width 512 --image-tokens 256

Both sides run in this process on the same random Qwen3-VL and the same noise: the sweep, the library's own naive
engine, and transformers with PyTorch forward hooks (vision features already computed). Medians of several calls.
"""

import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import tyro
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vlm_jax
from interventions import causal_trace


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the layer x module grid: sweep, naive, and transformers with hooks."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    image_tokens: int = 256
    """Visual tokens; a square number, times 4."""
    before: int = 12
    """Text tokens before the image."""
    after: int = 32
    """Question and answer tokens."""
    repeats: int = 3


def build(args: Args) -> Qwen3VLForConditionalGeneration:
    head_dim = args.width // args.heads
    third = head_dim // 6
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 8192,
            "hidden_size": args.width,
            "intermediate_size": 3 * args.width,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.heads // 2,
            "head_dim": head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
            },
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


def hooked_grid(model, arrays: dict, noise: np.ndarray, question: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """IE of every cell by forward hooks, one decoder pass a cell (batch of one)."""
    text, tensors = model.model.language_model, {k: torch.tensor(v) for k, v in arrays.items()}
    modules = [module for layer in text.layers for module in (layer.self_attn, layer.mlp)]
    captured = {}

    def embed_once():
        def keep(_, args, kwargs):
            captured["kwargs"] = {**kwargs, "use_cache": False}

        handle = text.register_forward_pre_hook(keep, with_kwargs=True)
        model(**tensors)
        handle.remove()

    def probability(embeds):
        kwargs = {**captured["kwargs"], "inputs_embeds": embeds}
        logits = model.lm_head(text(**kwargs).last_hidden_state[:, gold - 1])
        logp = torch.log_softmax(logits, -1)[0, torch.arange(len(gold)), tensors["input_ids"][0, gold]]
        return float(logp.mean().exp())

    with torch.no_grad():
        embed_once()
        embeds = captured["kwargs"]["inputs_embeds"]
        outputs = {}

        def record(i):
            return lambda module, args, out: outputs.__setitem__(i, out[0] if isinstance(out, tuple) else out)

        handles = [module.register_forward_hook(record(i)) for i, module in enumerate(modules)]
        probability(embeds)
        for handle in handles:
            handle.remove()
        corrupt = embeds + torch.tensor(noise * question[..., None])
        p_corrupt = probability(corrupt)
        cells = []
        for i, module in enumerate(modules):

            def patch(module, args, out, clean=outputs[i]):
                return (clean, *out[1:]) if isinstance(out, tuple) else clean

            handle = module.register_forward_hook(patch)
            cells.append(probability(corrupt) - p_corrupt)
            handle.remove()
    return np.array(cells).reshape(-1, 2)


def median_seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the first call and the median of the next ones."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return times[0], float(np.median(times[1:]))


def main(args: Args) -> None:
    hf = build(args)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model, _ = vlm_jax.load(folder)
    rng = np.random.default_rng(0)
    side = 2 * int(args.image_tokens**0.5)
    ids = rng.integers(0, 8000, (1, args.before + args.image_tokens + args.after))
    ids[0, args.before : args.before + args.image_tokens] = 8000
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": (ids == 8000).astype(int),
        "pixel_values": rng.normal(size=(side * side, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, side, side]]),
    }
    inputs = jax.device_put(vlm_jax.Inputs.from_hf(model.config, **arrays))
    question, answer = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    question[0, args.before + args.image_tokens : -4], answer[0, -4:] = True, True
    noise = rng.normal(size=(*ids.shape, args.width)).astype(np.float32) * 0.05

    def trace(engine):
        return causal_trace(model, inputs, question, answer, noise=noise, engine=engine).ie

    gold = np.flatnonzero(answer[0])
    hooked = hooked_grid(hf, arrays, noise, question, gold)
    worst = max(float(np.abs(np.asarray(trace(engine))[0] - hooked).max()) for engine in ("sweep", "naive"))
    jax.clear_caches()
    sides = {
        "sweep": lambda: trace("sweep"),
        "naive": lambda: trace("naive"),
        "transformers + hooks": lambda: hooked_grid(hf, arrays, noise, question, gold),
    }
    seconds = {name: median_seconds(call, args.repeats) for name, call in sides.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"{2 * args.layers} cells, {ids.shape[1]} tokens, width {args.width}; largest difference in IE {worst:.1e}")
    print("| engine | first call (s) | median (s) | times the sweep |\n|---|---|---|---|")
    for name, (first, median) in seconds.items():
        print(f"| {name} | {first:.2f} | {median:.3f} | {median / seconds['sweep'][1]:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
