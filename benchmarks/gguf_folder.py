"""A Llama in a GGUF file as an ordinary Hugging Face folder: config, tokeniser and safetensors.

It needs PyPI's ``gguf``, which is no dependency of the library. llama.cpp stores the rows of the query and key weights
in the order of its rotary embedding, which turns neighbouring pairs; Hugging Face turns a head's first half with its
second. So these rows are put back (the inverse of ``LlamaModel.permute`` in llama.cpp's convert_hf_to_gguf.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

#: llama.cpp's name of a tensor in a block -> Hugging Face's.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # the token type of special tokens


def write_folder(file: Path, folder: Path) -> None:
    """Reads the GGUF file of a Llama with a byte-level BPE tokeniser and writes a Hugging Face folder, with the
    dequantised weights in float32.

    Raises:
        ValueError: for another architecture or tokeniser.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{file} holds {kind}: only a llama with the tokeniser of SmolLM can be read")
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _halves(values, heads if "q_proj" in name else kv_heads)
        tensors[name] = np.ascontiguousarray(values)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = _config(fields, tied="lm_head.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(fields, folder)


def _name(name: str) -> str:
    """The Hugging Face name of a tensor."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    return f"{_OTHERS[parts[0]]}.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of ``weight (rows, width)``, in every head the first ones of the pairs before the second ones."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, half a head, 2, width)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 8),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "max_position_embeddings": fields["llama.context_length"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """SmolLM's tokeniser: byte-level BPE in which every digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [w for w, kind in zip(words, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    named = {
        f"{role}_token": words[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    whole.save_pretrained(folder)
