"""What a family is, and what families share: the decoder's fields and tensor names, and processors without video."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import Config, Rope, TextConfig
from vlm_jax.errors import UserError
from vlm_jax.families.key_table import KEEP, TRANSPOSE, Row, linear
from vlm_jax.nn.layers import ACTIVATIONS
from vlm_jax.processor import Processor, Tokenizer

_MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Chat:
    """How prompts write images and turns.

    placeholder: what the chat template writes for an image. It is replaced by ``before``, ``image`` once per visual
    token, and ``after``.
    image_end: the token that closes an image; None if the family has none.
    turn_end: what ends an answer in the chat template; None stands for the tokenizer's end token.
    """

    placeholder: str = ""
    image: str = ""
    before: str = ""
    after: str = ""
    image_end: str | None = None
    turn_end: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    read_config: ``(config.json, its transformers config, file name for errors) -> Config``.
    table: the key table, with every tensor that a checkpoint may have.
    layers: Hugging Face (and PEFT) module name of the stack of decoder layers.
    load_processor: reads the processor of a model folder.
    spellings: ``(prefix in files, prefix in the table)`` for tensor names that files spell in other ways. When a
    checkpoint is written, the first pair whose table prefix fits decides.
    flat_text: published configs have the decoder's fields at the top level, not in ``text_config``.
    unread: beginnings of the table's names of tensors that a checkpoint may have and the model does not read.
    """

    model_type: str
    read_config: Callable[[dict, Any, str], Config]
    table: tuple[Row, ...]
    layers: str
    load_processor: Callable[[Path], Processor]
    spellings: tuple[tuple[str, str], ...] = ()
    flat_text: bool = False
    unread: tuple[str, ...] = ()
    chat: Chat = Chat()

    def in_table(self, key: str) -> str:
        """The table's name of the tensor ``key`` of a file. The longest prefix that fits decides."""
        fits = [(disk, table) for disk, table in self.spellings if key.startswith(disk)]
        disk, table = max(fits, key=lambda pair: len(pair[0]), default=("", ""))
        return table + key.removeprefix(disk)

    def on_disk(self, key: str) -> str:
        """The name that transformers writes for the table's tensor ``key``."""
        for disk, table in self.spellings:
            if key.startswith(table):
                return disk + key.removeprefix(table)
        return key


def decoder_rows(prefix: str, head: str = "lm_head") -> tuple[Row, ...]:
    """The rows of a decoder whose Hugging Face module is ``prefix``, for all options; a model has only some of them."""
    layer = f"{prefix}.layers.{{}}"
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    norms = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    norms += ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return (
        Row(f"{prefix}.embed_tokens.weight", "text.embed_tokens.weight", KEEP),
        Row(f"{prefix}.register_embeddings.weight", "text.register_embeddings.weight", KEEP),
        *(row for name in linears for row in linear(f"{layer}.{name}", f"text.layers.{name}")),
        *(Row(f"{layer}.{name}.weight", f"text.layers.{name}.weight", KEEP) for name in norms),
        Row(f"{prefix}.norm.weight", "text.norm.weight", KEEP),
        Row(f"{head}.weight", "text.lm_head.kernel", TRANSPOSE),
    )


def supported(where: str, field: str, value: Any, values: Sequence[Any]) -> Any:
    """``value``, which must be one of ``values``.

    Raises:
        UserError: if it is not; the error names the field and the supported values.
    """
    if value not in values:
        raise UserError(f"{where}: {field} = {value!r} is not supported, only {', '.join(map(repr, values))}")
    return value


def positive(where: str, config: Any, *fields: str) -> dict[str, int]:
    """Fields of a transformers config that must be whole numbers above 0.

    Raises:
        UserError: if one is not.
    """
    numbers = {}
    for field in fields:
        value = getattr(config, field, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {field} = {value!r} is not supported, only a whole number above 0")
        if field in ("num_hidden_layers", "depth") and value > _MOST_LAYERS:
            raise UserError(f"{where}: {field} = {value} is more than the {_MOST_LAYERS} layers that any model has")
        numbers[field] = value
    return numbers


def above_zero(where: str, field: str, value: Any) -> float:
    """``value``, which must be a finite number above 0.

    Raises:
        UserError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {field} = {value!r} is not supported, only a finite number above 0")
    return value


def read_text(
    text: Any, where: str, *, tied: bool, mrope: tuple[tuple[int, int, int], bool] | None = None, **options: Any
) -> TextConfig:
    """The decoder's config from a transformers text config.

    Args:
        where: name of the file, for errors.
        tied: whether the unembedding is the token embedding.
        mrope: for a family with M-RoPE, its default ``mrope_section``, and whether the three positions take turns.
        options: fields of :class:`vlm_jax.config.TextConfig` that the family sets itself.

    Raises:
        UserError: for values that the decoder does not support.
    """
    sizes = positive(
        where,
        text,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    for field in ("num_attention_heads", "num_key_value_heads"):
        if sizes["num_attention_heads"] % sizes[field]:
            raise UserError(f"{where}: num_attention_heads must be a multiple of {field} = {sizes[field]}")
    depth = sizes["num_hidden_layers"]
    layer_types = tuple(getattr(text, "layer_types", None) or ("full_attention",) * depth)
    for kind in layer_types:
        supported(where, "layer_types", kind, ("full_attention", "sliding_attention"))
    if len(layer_types) != depth:
        raise UserError(f"{where}: layer_types has {len(layer_types)} entries for {depth} layers: give one per layer")
    act = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    head_dim = getattr(text, "head_dim", None) or sizes["hidden_size"] // sizes["num_attention_heads"]
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise UserError(f"{where}: head_dim = {head_dim!r} is not supported, only an even number above 0")
    kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in layer_types]
    parameters = text.rope_parameters
    rope = {kind: read_rope(parameters.get(kind, parameters), where, mrope) for kind in kinds}
    for kind in rope.values():
        section = kind.mrope_section
        whole = all(isinstance(part, int) and part >= 0 for part in section or ())
        if section is not None and not (whole and len(section) == 3 and sum(section) == head_dim // 2):
            raise UserError(
                f"{where}: mrope_section = {list(section)} is not supported, only three whole numbers of at least 0 "
                f"that add up to half of head_dim = {head_dim}"
            )
        # A sliding window counts tokens, but M-RoPE's positions do not.
        if section is not None and "sliding_attention" in rope:
            raise UserError(f"{where}: use_sliding_window = True is not supported with mrope_section, only False")
    if "sliding_attention" in rope:
        positive(where, text, "sliding_window")
    return TextConfig(
        **sizes,
        head_dim=head_dim,
        rms_norm_eps=above_zero(where, "rms_norm_eps", text.rms_norm_eps),
        tie_word_embeddings=tied,
        rope=tuple(rope.items()),
        layer_types=layer_types,
        sliding_window=text.sliding_window if "sliding_attention" in layer_types else None,
        hidden_act=supported(where, "hidden_act", act, tuple(ACTIVATIONS)),
        **positive(where, text, "max_position_embeddings"),
        **options,
    )


def ascending(where: str, field: str, indexes: Any, depth: int) -> tuple[int, ...]:
    """Layer indexes that must be in ascending order and below ``depth``.

    Raises:
        UserError: if they are not.
    """
    indexes = tuple(indexes)
    if list(indexes) != sorted(set(indexes)) or not set(indexes) <= set(range(depth)):
        raise UserError(f"{where}: {field} = {list(indexes)} is not supported, only ascending indexes below {depth}")
    return indexes


def whole_heads(where: str, width: int, heads: int) -> None:
    """Refuses a tower whose heads do not divide its width."""
    if width % heads:
        raise UserError(f"{where}: hidden_size = {width} of the vision tower is no multiple of its {heads} heads")


def attention_bias(text: Any) -> tuple[str, ...]:
    """Which attention linears have a bias, for families whose config decides it: all four or none."""
    return ("q_proj", "k_proj", "v_proj", "o_proj") if text.attention_bias else ()


def read_rope(parameters: dict, where: str, mrope: tuple[tuple[int, int, int], bool] | None = None) -> Rope:
    """A ``rope_parameters`` entry; ``mrope`` as in :func:`read_text`."""
    kind = parameters.get("rope_type", "default")
    kind = "default" if kind == "mrope" else kind  # an older name in Qwen2.5-VL's configs; mrope_section says it too
    supported(where, "rope_type", kind, ("default", "linear", "llama3"))
    fields = {f.name for f in dataclasses.fields(Rope)}
    values = {k: v for k, v in parameters.items() if k in fields and v is not None}
    if (section := values.get("mrope_section")) is not None:
        values["mrope_section"] = tuple(section) if isinstance(section, list | tuple) else (section,)
    for field in fields - {"rope_type", "mrope_section", "mrope_interleaved"}:
        if field in values or field == "rope_theta":
            values[field] = above_zero(where, field, values.get(field))
    if mrope is not None:  # transformers knows one form for each family, whatever the config says
        values.setdefault("mrope_section", mrope[0])
        supported(where, "mrope_interleaved", values.setdefault("mrope_interleaved", mrope[1]), mrope[1:])
    rope = Rope(**{**values, "rope_type": kind, "rope_theta": float(values["rope_theta"])})
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise UserError(
            f"{where}: low_freq_factor = {rope.low_freq_factor} is not supported, only one below high_freq_factor = "
            f"{rope.high_freq_factor}"
        )
    return rope


def tied(hf: dict, default: bool = False) -> bool:
    """``tie_word_embeddings``, which may be at the top of a config or in its text part."""
    return bool(hf.get("tie_word_embeddings", (hf.get("text_config") or {}).get("tie_word_embeddings", default)))


def token_ids(hf: dict, config: Any, where: str) -> dict[str, Any]:
    """The tokens that stand for images, end a turn and pad, as fields of :class:`vlm_jax.config.Config`.

    Raises:
        UserError: for one that is no token.
    """
    text = config.get_text_config()
    eos, pad = (hf.get(name, getattr(text, name, None)) for name in ("eos_token_id", "pad_token_id"))
    eos = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = None if pad == -1 else pad  # Llama's old configs write no padding so
    image = getattr(config, "image_token_id", None)
    image_field = "image_token_index" if "image_token_index" in hf else "image_token_id"
    named = [("eos_token_id", token) for token in eos] + [("pad_token_id", pad), (image_field, image)]
    for field, token in named:
        if token is not None and not (type(token) is int and token >= 0):
            raise UserError(f"{where}: {field} = {token!r} is no token, only a whole number of at least 0 is")
    return {
        "image_token_id": image,
        "eos_token_ids": eos,
        "pad_token_id": next((p for p in (pad, *eos) if p is not None), 0),
    }


def read_backbone(model_type: str, **options: Any) -> Callable[[dict, Any, str], Config]:
    """The ``read_config`` function of a text-only model.

    Args:
        options: fields of :class:`vlm_jax.config.TextConfig` that the family sets itself: values, or functions that get
            a value from the transformers config.
    """

    def read_config(hf: dict, config: Any, where: str) -> Config:
        values: dict[str, Any] = {k: v(config) if callable(v) else v for k, v in options.items()}
        text = read_text(config, where, tied=bool(config.tie_word_embeddings), **values)
        return Config(model_type, text, None, **token_ids(hf, config, where))

    return read_config


class TextProcessor:
    """The processor of a text-only model: a tokenizer alone."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.chat_template, self.image_processor = tokenizer, tokenizer.chat_template, None

    def apply_chat_template(self, conversation: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; without a chat template, the texts of its messages one after another."""
        flat = [{"role": m["role"], "content": "".join(part["text"] for part in m["content"])} for m in conversation]
        if self.tokenizer.chat_template is None:
            return "".join(message["content"] for message in flat)
        # Without enable_thinking=False, Qwen3's template makes the model think first. Other templates ignore it.
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": False}
        return self.tokenizer.apply_chat_template(flat, tokenize=False, **options)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the tokenizer's files to a folder."""
        self.tokenizer.save_pretrained(save_directory)


def load_tokenizer(folder: Path) -> TextProcessor:
    """The processor of a folder with a text-only model."""
    from transformers import AutoTokenizer

    return TextProcessor(AutoTokenizer.from_pretrained(folder))


def load_parts(folder: Path) -> dict[str, Any]:
    """Image processor (with the PIL backend, which needs no torch), tokenizer and chat template of a folder."""
    import json

    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    elif (folder / "chat_template.json").is_file():
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return {"image_processor": images, "tokenizer": tokenizer, "chat_template": template}


def without_video(processor: type) -> type:
    """A Qwen processor class without its video part, which is the only part that needs torchvision."""
    from transformers.processing_utils import ProcessorMixin

    class ImageOnlyProcessor(processor):
        """``ProcessorMixin`` loads the parts that ``__init__`` names, so this one has no video processor."""

        def __init__(self, image_processor, tokenizer, chat_template=None, **ignored):
            for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
                short, token = name.removesuffix("_pad"), f"<|{name}|>"
                setattr(self, f"{short}_token", token)
                setattr(self, f"{short}_token_id", tokenizer.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImageOnlyProcessor
