"""Model families, one file each: how to read a config, the key table and how prompts write images.

To add a family, write such a file (``FAMILY`` and ``BACKBONE``, :class:`vlm_jax.families.base.Family`) and name it in
``_MODULES`` below. A new vision tower is a file in ``vlm_jax/vision``; its sites are in ``vlm_jax/sites.py`` and its
kernels in ``AXES`` or ``REPLICATED`` of ``vlm_jax/mesh/sharding.py``.
"""

import dataclasses
import json

from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import gemma3, llava, qwen2_5_vl, qwen3_vl
from vlm_jax.families.base import Family

_MODULES = (qwen3_vl, qwen2_5_vl, gemma3, llava)
FAMILIES: dict[str, Family] = {
    family.model_type: family for module in _MODULES for family in (module.FAMILY, module.BACKBONE)
}
#: ``model_type`` of a vision-language model -> that of the text-only model inside it.
BACKBONES: dict[str, str] = {module.FAMILY.model_type: module.BACKBONE.model_type for module in _MODULES}

#: The precisions that a config may state. What counts is the tensors' own.
_DTYPES = ("float32", "bfloat16", "float16")


def read_config(hf: dict, where: str) -> Config:
    """Our config from a Hugging Face ``config.json``.

    transformers' config class reads it first, because it knows all older spellings and the default values.

    Args:
        where: name of the file, for errors.

    Raises:
        UserError: for an unknown architecture, or values that are missing or not supported.
    """
    from transformers import CONFIG_MAPPING

    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{where}: unsupported architecture {model_type!r}{nearest(str(model_type), FAMILIES)}")
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is not supported: use the checkpoint in bfloat16 or float32")
    family = FAMILIES[model_type]
    for part in ("text_config", "vision_config") if family.chat.image else ():
        flat = part == "text_config" and family.flat_text and "hidden_size" in hf
        if not flat and not isinstance(hf.get(part), dict):
            raise UserError(f"{where}: field {part!r} is missing; is this a whole {model_type} folder?")
    for part in (hf, hf.get("text_config"), hf.get("vision_config")):
        stated = part.get("dtype", part.get("torch_dtype")) if isinstance(part, dict) else None
        if stated not in (None, "auto", *_DTYPES):
            raise UserError(f"{where}: dtype {str(stated)[:60]!r} is not supported{nearest(str(stated), _DTYPES)}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(hf)))
    except Exception as error:  # transformers validates with errors of many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: transformers cannot read this config ({reason}): repair it") from None
    try:
        return dataclasses.replace(family.read_config(hf, config, where), hf=json.dumps(hf))
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where}: a field is missing or has a value of another type ({reason}): repair it") from None


def backbone_config(config: Config) -> Config:
    """The config of the text-only model inside a vision-language model, as read from a ``config.json`` of its own."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf, model_type = json.loads(config.hf), BACKBONES[config.family]
    text = CONFIG_MAPPING[config.family].from_dict(json.loads(config.hf)).get_text_config().to_diff_dict()
    known = CONFIG_MAPPING[model_type]().to_dict()
    text = {k: v for k, v in text.items() if k in known}
    # On text the three positions of M-RoPE are equal, so the text-only model has plain rotary embeddings.
    text["rope_parameters"] = {
        k: v for k, v in text["rope_parameters"].items() if k != "type" and not k.startswith("mrope")
    }
    text |= {k: hf[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if hf.get(k) is not None}
    text |= {
        "model_type": model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "dtype": hf.get("dtype", hf.get("torch_dtype")),  # saving replaces it by the parameters' dtype
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    return read_config(text, f"the text_config of a {config.family}")
