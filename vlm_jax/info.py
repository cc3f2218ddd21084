"""Prints a model's shapes, parameters and bytes. It reads only ``config.json``.

python -m vlm_jax.info Qwen3-VL-4B
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

from vlm_jax.checkpoints.leaves import abstract, named_leaves
from vlm_jax.checkpoints.sources import REGISTERS, embedded_models, read_config, resolve
from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.published import PUBLISHED, published_config
from vlm_jax.runs.command import command
from vlm_jax.runs.ranges import Range
from vlm_jax.sites import PROJECTOR_SITES, TEXT_LINEARS
from vlm_jax.vision.vit import ViTVision

MODEL_PARTS = ("vision tower", "projector", "embeddings", "decoder layers", "final norm", "head")
_TEXT_PARTS: dict[str, str] = dict(zip(("embed_tokens", "layers", "norm", "lm_head"), MODEL_PARTS[2:], strict=True))
_TEXT_PARTS["register_embeddings"] = "embeddings"
_PROJECTOR = {site.removeprefix("projector.") for site in PROJECTOR_SITES}


@dataclasses.dataclass(frozen=True)
class Args:
    """Print a model's shapes, parameters, LoRA parameters and bytes. No weights are downloaded and nothing is
    allocated."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Published name (such as Qwen3-VL-4B), embedded model, Hugging Face folder or hub id."""
    r: Annotated[int, Range(least=1)] = 64
    """Rank of the LoRA adapters."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the key-value cache."""


def config_of(source: str) -> Config:
    """The config of a published or embedded name, a folder or a hub id. Of a hub id only the config is downloaded.

    Raises:
        UserError: for an unknown source, or a config that cannot be downloaded or read.
    """
    if Path(source).exists() or source in embedded_models():
        return read_config(resolve(source))
    if source in PUBLISHED:
        return published_config(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {source!r}: no such folder, embedded or published model"
            f"{nearest(source, [*embedded_models(), *PUBLISHED])}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_config(
            Path(snapshot_download(source, allow_patterns=["config.json", "generation_config.json", REGISTERS]))
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch the config of {source!r} from the hub ({type(error).__name__}): check the id and the "
            "network, or give a local folder or a published name"
        ) from None


def parameter_counts(config: Config) -> dict[str, int]:
    """The number of parameters of each of :data:`MODEL_PARTS` that the model has, and their "total". A tied head has
    none of its own."""
    sizes: Counter[str] = Counter()
    for name, leaf in named_leaves(abstract(config)).items():
        tower, part, *rest = name.split(".")
        if tower == "text":
            sizes[_TEXT_PARTS[part]] += leaf.size
        else:
            sizes["projector" if _PROJECTOR & {part, *rest} else "vision tower"] += leaf.size
    return {**{part: sizes[part] for part in MODEL_PARTS if sizes[part] or part == "head"}, "total": sizes.total()}


def lora_parameter_counts(config: Config, r: int) -> dict[str, int]:
    """Placement -> the number of parameters of rank-``r`` LoRA: ``r * (inputs + outputs)`` for each linear."""
    leaves, depth = named_leaves(abstract(config)), config.text.num_hidden_layers
    attn, mlp = (
        sum(r * sum(leaves[f"text.layers.{linear}.kernel"].shape[1:]) for linear in TEXT_LINEARS[module])
        for module in ("attn", "mlp")
    )
    return {
        "LLM-all": depth * (attn + mlp),
        "attn only": depth * attn,
        "mlp only": depth * mlp,
        "one attn module": attn,
        "one mlp module": mlp,
    }


def byte_counts(config: Config, dtype: str) -> dict[str, int]:
    """Bytes of the weights in float32 and bfloat16, and of the key-value cache per token in ``dtype``. Layers with a
    sliding window cache all tokens too."""
    total, text = parameter_counts(config)["total"], config.text
    cached_numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return {
        "weights, float32": 4 * total,
        "weights, bfloat16": 2 * total,
        f"KV cache per token, {dtype}": cached_numbers * jnp.dtype(dtype).itemsize,
    }


def describe_shapes(config: Config) -> dict[str, str]:
    """A description of the decoder, the vision tower and the visual tokens, as label -> text."""
    text, vision = config.text, config.vision
    descriptions = {
        "family": config.family,
        "decoder": f"{text.num_hidden_layers} layers x {text.hidden_size}, MLP {text.intermediate_size}, "
        f"{text.num_attention_heads} query and {text.num_key_value_heads} key-value heads of {text.head_dim}, "
        f"vocabulary {text.vocab_size}",
    }
    if text.sliding_window:
        count = text.layer_types.count("sliding_attention")
        descriptions["window"] = f"{count} of {text.num_hidden_layers} layers see {text.sliding_window} tokens back"
    if text.registers is not None:
        own = " with embeddings of their own" if text.registers.trained else ""
        descriptions["registers"] = f"{text.registers.count} behind every image{own}, mask {text.registers.mask}"
    if vision is None:
        return descriptions
    patch = vision.patch_size
    descriptions["vision tower"] = (
        f"{vision.depth} blocks x {vision.hidden_size}, MLP {vision.intermediate_size}, {vision.num_heads} heads, "
        f"patches of {patch} x {patch}"
    )
    if isinstance(vision, ViTVision):
        descriptions["visual tokens"] = f"{vision.tokens} per image of {vision.image_size} x {vision.image_size}"
    else:
        side = patch * vision.spatial_merge_size
        descriptions["visual tokens"] = f"one per {side} x {side} pixels"
    return descriptions


def _readable(size: int) -> str:
    """A number of bytes in the largest fitting unit, such as "8.27 GiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    step = min((size.bit_length() - 1) // 10, len(units) - 1)
    return f"{size / 1024**step:.4g} {units[step]}"


@command
def main(args: Args) -> None:
    config = config_of(args.model)
    print(args.model)
    for name, value in describe_shapes(config).items():
        print(f"  {name:14s}{value}")
    tables = {
        "parameters": parameter_counts(config),
        f"LoRA parameters, r = {args.r}": lora_parameter_counts(config, args.r),
        "bytes": byte_counts(config, args.dtype),
    }
    for title, numbers in tables.items():
        print(f"\n{title}")
        for name, number in numbers.items():
            note = f"  {_readable(number)}" if title == "bytes" else ""
            note = "  tied to the embeddings" if name == "head" and not number else note
            print(f"  {name:29s}{number:>18,}{note}")


if __name__ == "__main__":
    main(tyro.cli(Args))
