"""The embedded models before training: a small tokeniser, a processor, a config, as an ordinary Hugging Face folder."""

import json
from pathlib import Path

from vlm_jax.data import pretraining, wordings, world
from vlm_jax.prompts import P0_PROMPT

VOCABULARY = 1024
#: Longest prompt the embedded models take, in tokens.
CONTEXT = 512
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def corpus() -> list[str]:
    """Text whose words deserve tokens of their own. Capitals and digits stay single: the world spells with them."""
    kinds = [*wordings.FACTS.values(), *wordings.HINTS.values(), wordings.CHOICES]
    kinds += [wordings.FIELD, wordings.BAR, wordings.SIGN]
    lines = [template.replace("|", " ") for kind in kinds for template in (*kind.familiar, *kind.held_out)] * 30
    values = [value for values in world.RELATIONS.values() for value in values]
    lines += [f"{word}\nthe {word}" for word in (*values, *world.COLOURS, *world.SHAPES)] * 30
    lines += [f"{turn.prompt}\n{turn.answer}" for turn in map(pretraining.text_fact, range(2000))]
    return lines + [P0_PROMPT, "user\nassistant\nName it. Describe. Read. "] * 100


def tokenizer():
    """A byte-level BPE with Qwen's splitting rules and special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    # Splits before every capital or digit inside a word, so that no learnt token holds two of them.
    alone = pre_tokenizers.Split(Regex(r"[A-Z](?![a-z])|\d|\{\w*\}"), "removed")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([alone, words])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus(), trainer)
    model = json.loads(bpe.to_str())["model"]
    result = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )
    result.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    return result


def write_qwen3_vl(folder: Path) -> None:
    """Everything of the folder but the weights."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    tok.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Images become about 64 x 64 pixels: 16 visual tokens.
    Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 48 * 48, "longest_edge": 80 * 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    token = {name: tok.convert_tokens_to_ids(name) for name in SPECIALS}
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
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "tie_word_embeddings": True,
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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
