"""Model families, one file each: config mapping, key table, prompt and span rules.

A family is a module with ``MODEL_TYPE``, ``read_config(dict) -> Config``, ``TABLE`` (see
:mod:`vlm_jax.checkpoint`) and ``load_processor(folder)``.
"""

from types import ModuleType

from vlm_jax.errors import UserError, nearest
from vlm_jax.families import qwen3_vl

FAMILIES: dict[str, ModuleType] = {family.MODEL_TYPE: family for family in (qwen3_vl,)}


def family_of(model_type: str, where: str) -> ModuleType:
    """The family for a ``config.json``'s ``model_type``; ``where`` names the file in the error."""
    if model_type not in FAMILIES:
        raise UserError(f"{where}: unsupported architecture {model_type!r}{nearest(str(model_type), FAMILIES)}")
    return FAMILIES[model_type]
