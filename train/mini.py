"""Writes the Hugging Face folder of an embedded model before it is trained: tokeniser, processor and config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.data import pretraining, wordings, world
from vlm_jax.prompts import P0_PROMPT

VOCABULARY = 1024
#: The longest prompt of the embedded models, in tokens.
CONTEXT = 512
#: Single capitals, digits and names in braces. Text is split at each of them, so no learnt token contains two of them.
_ALONE = r"[A-Z](?![a-z])|\d|\{\w*\}"
#: The decoder of every embedded model.
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
#: The normalisation of images in every embedded model.
_PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def corpus(spatial: bool) -> list[str]:
    """The text on which the tokenisers are trained: the miniworld's words and wordings, with ``spatial`` those about
    arrangements too."""
    kinds = [*wordings.FACTS.values(), *wordings.HINTS.values(), wordings.CHOICES]
    kinds += [wordings.FIELD, wordings.BAR, wordings.SIGN]
    lines = [template.replace("|", " ") for kind in kinds for template in (*kind.familiar, *kind.held_out)] * 30
    values = [value for values in world.RELATIONS.values() for value in values]
    lines += [f"{word}\nthe {word}" for word in (*values, *world.COLOUR_RGB, *world.SHAPES)] * 30
    lines += [f"{turn.prompt}\n{turn.answer}" for turn in map(pretraining.text_fact, range(2000))]
    if spatial:
        lines += [f"{turn.prompt}\n{turn.answer}" for turn in map(pretraining.spatial_turn, range(1000))]
        lines += [form.format(statement="", question="", clause="") for form in wordings.CLAIM.held_out] * 30
        lines += list(wordings.DESCRIBE.held_out) * 30
    return lines + [P0_PROMPT, "user\nassistant\nName it. Describe. Read. "] * 100


def _alone(spatial: bool):
    """Where text is split before the tokeniser learns. With ``spatial`` also at each punctuation mark, so that a shape
    at the end of a statement has the same token as elsewhere."""
    from tokenizers import Regex

    return Regex(_ALONE + r"|[.,:?]" * spatial)


def sentencepiece(specials: list[str], spatial: bool) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a BPE with byte fallback, as in Gemma and Llama. The special tokens come first, then the
    256 bytes, then pieces in which a space is "\u2581"."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    first = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_alone(spatial), "removed"),
            pre_tokenizers.Split("\u2581", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    printable = [chr(code) for code in range(33, 127)] + ["\u2581", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(first), initial_alphabet=printable, show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(corpus(spatial), trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*first, *sorted(model["vocab"], key=model["vocab"].get)])}
    return vocab, [tuple(merge) for merge in model["merges"]]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write(folder: Path, tokenizer, images, template: str, config: dict, end: str) -> None:
    """Writes all files of a model's folder except the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    _write_json(folder / "config.json", config)
    generation = {
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    _write_json(folder / "generation_config.json", generation)


QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def qwen_tokenizer(spatial: bool):
    """A byte-level BPE with Qwen's splitting rules and special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(_alone(spatial), "removed")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([alone, words])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(QWEN_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(spatial), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]  # transformers' annotation lacks lists of pairs
    result = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )
    result.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIALS)})
    return result


def write_qwen3_vl(folder: Path, spatial: bool = False) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tok = qwen_tokenizer(spatial)
    # Images become about 64 x 64 pixels: 16 visual tokens.
    size = {"shortest_edge": 48 * 48, "longest_edge": 80 * 64}
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size, **_PIXELS)
    token = {name: tok.convert_tokens_to_ids(name) for name in QWEN_SPECIALS}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **_DECODER,
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }
    _write(folder, tok, images, QWEN_TEMPLATE, config, "<|im_end|>")


GEMMA_SPECIALS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{%- if message.content is string -%}{{ message.content | trim }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<start_of_image>' }}"
    "{%- else -%}{{ part.text | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def write_gemma3(folder: Path, spatial: bool = False) -> None:
    from transformers import GemmaTokenizer
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    vocab, merges = sentencepiece(GEMMA_SPECIALS, spatial)
    image_tokens = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tok = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=image_tokens,
        model_max_length=CONTEXT,
        padding_side="left",
    )
    tok.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}, False)
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, do_pan_and_scan=False, **_PIXELS)
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "float32",
        "mm_tokens_per_image": 64,
        "image_token_index": vocab["<image_soft_token>"],
        "boi_token_index": vocab["<start_of_image>"],
        "eoi_token_index": vocab["<end_of_image>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma3_text",
            **_DECODER,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            # A prompt has about 150 tokens. Two of the eight layers see all of them, the others only 128.
            "sliding_window": 128,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "bos_token_id": vocab["<bos>"],
            "eos_token_id": vocab["<eos>"],
            "pad_token_id": vocab["<pad>"],
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 3,
            "image_size": 64,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
    }
    _write(folder, tok, images, GEMMA_TEMPLATE, config, "<end_of_turn>")


LLAMA_SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
LLAVA_TEMPLATE = (
    "{%- for message in messages -%}{{ message.role | upper + ': ' }}"
    "{%- if message.content is string -%}{{ message.content + ' ' }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>\n' }}"
    "{%- else -%}{{ part.text + ' ' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def write_llava(folder: Path, spatial: bool = False) -> None:
    from transformers import LlamaTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocab, merges = sentencepiece(LLAMA_SPECIALS, spatial)
    tok = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=CONTEXT,
        padding_side="left",
    )
    # The whole image is resized to a square, because a crop could remove the answer.
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, **_PIXELS)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": vocab["<image>"],
        "image_seq_length": 64,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "llama",
            **_DECODER,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": vocab["<s>"],
            "eos_token_id": vocab["</s>"],
            "pad_token_id": vocab["<pad>"],
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_channels": 3,
            "image_size": 64,
            "patch_size": 8,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
            "projection_dim": 128,
        },
    }
    _write(folder, tok, images, LLAVA_TEMPLATE, config, "</s>")


#: Embedded model -> the function that writes its folder without the weights. Its second argument: whether the tokeniser
#: learns the words about arrangements.
WRITERS: dict[str, Callable[..., None]] = {
    "mini-qwen3-vl": write_qwen3_vl,
    "mini-gemma3": write_gemma3,
    "mini-llava": write_llava,
}
