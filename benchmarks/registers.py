"""What registers buy: the cache's bytes and the tokens a second of generation, with the picture in the cache and
without.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/registers.py --json runs/registers_speed.json

The decoder has random weights. Both sides generate the same tokens and take turns in one process, so that other work on
the machine slows both alike. Times are medians of the turns after the first. The time of a token is the difference
between a generation of one token and a generation of many, so it is without the prompt. The vision tower is left out.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro
from lora import machine

import vlm_jax
from vlm_jax import Inputs, Model
from vlm_jax.checkpoints.sources import read_config, resolve
from vlm_jax.config import Config, with_registers
from vlm_jax.generate import decoding, generation_program, held_tokens
from vlm_jax.registers import Registers

#: Text before and behind the picture, in tokens.
_BEFORE, _BEHIND = 16, 48
#: Layers, key-value heads, width of a head and bytes of a number of Qwen2.5-VL-7B.
_QWEN = (28, 4, 128, 2)


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare the memory and the speed of generation with and without the picture's keys and values."""

    image_tokens: tuple[int, ...] = (64, 256, 1024, 2048)
    """Visual tokens of a picture."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Prompts that are continued together."""
    most: int = 16384
    """Combinations with more visual tokens in all are left out."""
    registers: int = 16
    """Registers behind the picture."""
    new_tokens: int = 32
    """Tokens to generate."""
    repeats: int = 3
    """Turns."""
    layers: int = 28
    """Layers of the decoder, with 16 heads of 64 and 8 key-value heads, and an MLP of three times the width."""
    width: int = 1024
    """Its width."""
    json: Path | None = None
    """Where to write the figures."""


def decoder(args: Args) -> Config:
    """The config of the decoder, with registers."""
    config = read_config(resolve("mini-llava"))
    text = dataclasses.replace(
        config.text,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        layer_types=("full_attention",) * args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=None,
    )
    config = dataclasses.replace(config, text=text)
    return with_registers(config, Registers(args.registers, config.eos_token_ids[0]))


def prompts(batch: int, image_tokens: int, registers: int) -> Inputs:
    """Prompts of random text with a picture, whose visual tokens have the embeddings of random tokens."""
    length = _BEFORE + image_tokens + registers + _BEHIND
    place = np.arange(length)
    in_image = (place >= _BEFORE) & (place < _BEFORE + image_tokens)
    number = place - _BEFORE - image_tokens
    is_register = (number >= 0) & (number < registers)
    rows = np.ones((batch, 1), np.int32)
    return Inputs(
        np.random.default_rng(0).integers(300, 1000, (batch, length)).astype(np.int32),
        np.ones((batch, length), bool),
        np.broadcast_to(place, (3, batch, length)).astype(np.int32),
        image_index=rows * np.where(in_image, place - _BEFORE, -1),
        register_index=rows * np.where(is_register, number, -1),
    )


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side. The first turn, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cache_bytes(jaxpr) -> int | None:
    """The bytes of the cache that a generation's loop carries from token to token; None without such a loop."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            cache = [out.aval for out in equation.outvars if out.aval.ndim == 5]
            return sum(array.size * array.dtype.itemsize for array in cache)
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found = cache_bytes(getattr(inner, "jaxpr", inner))
                if found is not None:
                    return found
    return None


def main(args: Args) -> None:
    vlm_jax.configure()
    print(machine())
    config = decoder(args)
    model = jax.jit(lambda: Model(dataclasses.replace(config, vision=None), jax.random.key(0)))()
    print("| visual tokens | batch | cache MiB a prompt | without the picture | tokens/s | without | times as fast |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for image_tokens in args.image_tokens:
        for batch in args.batches:
            if image_tokens * batch > args.most:
                continue
            inputs = prompts(batch, image_tokens, args.registers)

            def generating(count: int, drop: bool, inputs: Inputs = inputs) -> Callable[[], object]:
                return lambda: vlm_jax.generate(model, inputs, count, drop_images=drop, eos_token_id=())

            counts = (1, 1 + args.new_tokens)
            sides = {f"{count} {drop}": generating(count, drop) for count in counts for drop in (False, True)}
            np.testing.assert_array_equal(*(sides[f"{counts[1]} {drop}"]() for drop in (False, True)))
            seconds = medians(sides, args.repeats)
            rates = [
                batch * args.new_tokens / (seconds[f"{counts[1]} {drop}"] - seconds[f"{counts[0]} {drop}"])
                for drop in (False, True)
            ]
            kept = []
            for held in (None, held_tokens(model, inputs)):
                options = decoding(model, counts[1], eos_token_id=(), held=held)
                program = jax.make_jaxpr(generation_program, static_argnums=3)(model, inputs, (), options, None)
                cache = cache_bytes(program.jaxpr)
                assert cache, "a generation of several tokens has a loop with a cache"
                kept.append(cache / batch / 2**20)
            rows.append({"image_tokens": image_tokens, "batch": batch, "cache_mib": kept, "tokens_per_second": rates})
            print(
                f"| {image_tokens:,} | {batch} | {kept[0]:.1f} | {kept[1]:.1f} | {rates[0]:,.1f} | {rates[1]:,.1f} | "
                f"{rates[1] / rates[0]:.2f} |"
            )
    layers, groups, dim, size = _QWEN
    token = 2 * layers * groups * dim * size / 2**20
    print(
        f"\nQwen2.5-VL-7B in bfloat16 keeps {token * 1024:.1f} MiB for a picture of 1,024 visual tokens, and "
        f"{token * args.registers:.2f} MiB for {args.registers} registers"
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
