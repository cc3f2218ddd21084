"""Finds the folder of a model (embedded, local or on the hub) and reads its config."""

import os
from pathlib import Path

from vlm_jax import families
from vlm_jax.config import Config, with_registers
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import read_json
from vlm_jax.published import PUBLISHED
from vlm_jax.registers import Registers

#: The folder of the embedded models.
MINI = Path(__file__).parents[1] / "mini"
SINGLE, INDEX, ORBAX = "model.safetensors", "model.safetensors.index.json", "orbax"
#: The file that says which registers a model was trained with.
REGISTERS = "registers.json"


def embedded_models() -> list[str]:
    """The names of the models that are part of the library."""
    return sorted(p.parent.name for p in MINI.glob("*/config.json"))


def resolve(source: str | os.PathLike) -> Path:
    """The folder of an embedded model, a local folder, or the downloaded folder of a hub id.

    Raises:
        UserError: for an unknown name, a folder without ``config.json``, or a download that fails.
    """
    if not str(source).strip():
        raise UserError(f"the model's name is empty: give a folder, a hub id or one of {', '.join(embedded_models())}")
    path = Path(source)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(f"{source} holds no config.json: name a Hugging Face model folder")
    if str(source) in embedded_models():
        return MINI / str(source)
    if str(source) in PUBLISHED:
        raise UserError(
            f"{source} is a published model whose weights are needed here: give its hub id or a folder that holds it"
        )
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {str(source)!r}: no such folder or embedded model{nearest(str(source), embedded_models())}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch {str(source)!r} from the hub ({type(error).__name__}): check the id and the network, "
            f"or give a local folder or an embedded model ({', '.join(embedded_models())})"
        ) from None


def read_config(folder: Path) -> Config:
    """The config of a Hugging Face folder, with its registers."""
    where = folder / "config.json"
    hf = read_json(where)
    if (folder / "generation_config.json").is_file():
        # Often only this file has the tokens at which generation stops.
        generation = read_json(folder / "generation_config.json")
        hf |= {k: generation[k] for k in ("eos_token_id", "pad_token_id") if generation.get(k) is not None}
    config, own = families.read_config(hf, str(where)), folder / REGISTERS
    if not own.is_file():
        return config
    registers = Registers.from_json(read_json(own), str(own))
    try:
        return with_registers(config, registers)
    except UserError as error:
        raise UserError(f"{own}: {error}") from None
