"""Dictionaries on disk. They are written as SAELens folders. Those of SAELens, Llama Scope, Gemma Scope and MMDiff can
be read.

Whatever normalisation a file describes is folded into the arrays, so that a dictionary takes raw activations.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interventions.dictionary import Dictionary, check_dictionary
from interventions.diff.place import Place
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import read_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
#: The version of SAELens whose layout is written. Readers treat files without a version as older than 6.
_SAELENS = "6.54.12"
_ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
#: Architectures of SAELens that are one of ours. A "standard" one has a plain ReLU, which is a threshold of 0.
_ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "standard")
_GEMMA_SCOPE, _LLAMA_SCOPE = "params.npz", ("hyperparams.json", "checkpoints/final.safetensors")


class Stored(NamedTuple):
    """A dictionary of a file, and what the file says about it."""

    dictionary: Dictionary
    place: Place | None
    """None if the file does not tell it."""
    model: str | None
    """The fingerprint of the model whose activations it was trained on; None if the file does not tell it."""
    sparsity: np.ndarray | None = None
    """For each latent, log10 of the share of tokens on which it is active; None if the file does not tell it."""


def save_dictionary(
    folder: Path,
    dictionary: Dictionary,
    place: Place,
    *,
    model: str,
    model_name: str,
    sparsity: np.ndarray | None = None,
) -> None:
    """Writes a dictionary as a SAELens folder: ``cfg.json``, ``sae_weights.safetensors`` and, if it is known,
    ``sparsity.safetensors``.

    Args:
        model: the fingerprint of the model whose activations it was trained on.
        model_name: the model's name, for readers.
        sparsity: see :class:`Stored`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(a, np.float32) for name in _ARRAYS if (a := getattr(dictionary, name)) is not None}
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    if sparsity is not None:
        save_file({"sparsity": np.asarray(sparsity, np.float32)}, folder / SPARSITY)
    metadata: dict[str, Any] = {"sae_lens_version": _SAELENS, "sae_lens_training_version": None}
    metadata |= {"model_name": model_name, "site": place.site, "layer": place.layer, "model_fingerprint": model}
    if place.hook is not None:
        metadata["hook_name"] = place.hook
    config = {
        "architecture": dictionary.architecture,
        "d_in": dictionary.width,
        "d_sae": dictionary.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if place.site == "text.head_out" else "none",
        "metadata": metadata,
    }
    if dictionary.architecture == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_dictionary(source: Path, k: int | None = None) -> Stored:
    """The dictionary of a file or folder: of SAELens (``cfg.json`` and ``sae_weights.safetensors``), Llama Scope
    (``hyperparams.json`` and ``checkpoints/final.safetensors``), Gemma Scope (``params.npz``), or a safetensors file
    with ``W_enc``, ``b_enc``, ``W_dec``, ``b_dec`` and perhaps ``threshold``, as MMDiff's.

    Args:
        k: makes a TopK dictionary of one with thresholds or without an activation function. P2 does so with Llama
            Scope's.

    Raises:
        UserError: for a missing, damaged or pickled file, an architecture that is none of ours, or a normalisation that
            cannot be folded in.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist: name the folder or the file of a dictionary")
    if (source / CONFIG).is_file():
        stored = _saelens(source)
    elif all((source / name).is_file() for name in _LLAMA_SCOPE):
        stored = _llama_scope(source)
    elif source.name == _GEMMA_SCOPE or (source / _GEMMA_SCOPE).is_file():
        stored = _gemma_scope(source if source.is_file() else source / _GEMMA_SCOPE)
    elif source.suffix == ".safetensors":
        stored = _plain(source, k)
    elif source.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UserError(f"{source} is a pickle, which can run any code: convert it to safetensors where you trust it")
    else:
        raise UserError(
            f"{source} holds no dictionary: name a folder with {CONFIG}, {_GEMMA_SCOPE} or {_LLAMA_SCOPE[0]}, or a "
            ".safetensors file"
        )
    if k is not None:
        stored = stored._replace(dictionary=stored.dictionary.replace(architecture="topk", k=k, threshold=None))
    return stored._replace(dictionary=check_dictionary(stored.dictionary, str(source)))


def load_dictionaries(folder: Path) -> dict[Place, Stored]:
    """All dictionaries that ``train.sae`` wrote to a run folder.

    Raises:
        UserError: if there is none, or one cannot be read.
    """
    found = sorted((folder / "dictionaries").glob("*"))
    if not found:
        raise UserError(f"{folder} holds no dictionaries: name the --out of a finished train.sae")
    loaded = {}
    for path in found:
        place, stored = Place.parse(path.name), load_dictionary(path)
        if stored.place not in (None, place._replace(seed=None)):
            raise UserError(f"{path} holds the dictionary of {stored.place}: give the folder its name back")
        loaded[place] = stored
    return loaded


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, in float32."""
    try:
        loaded = load_file(path)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): fetch it again") from None
    for name, array in loaded.items():
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{path}: {name} holds {array.dtype}, not floating-point numbers: convert it first")
    return {name: array.astype(np.float32) for name, array in loaded.items()}


def _built(arrays: Mapping[str, np.ndarray], where: Path, architecture: str, k: Any = None) -> Dictionary:
    """A dictionary of named arrays. A missing bias of the encoder is 0; so are missing thresholds."""
    if missing := [name for name in ("W_enc", "W_dec", "b_dec") if name not in arrays]:
        raise UserError(f"{where} lacks {missing[0]}: fetch it again")
    named = {name: arrays[name] for name in _ARRAYS if name in arrays}
    latents = np.shape(named["W_dec"])[:1]
    named.setdefault("b_enc", np.zeros(latents, np.float32))
    if architecture == "jumprelu":
        named.setdefault("threshold", np.zeros(latents, np.float32))
    else:
        named.pop("threshold", None)
    dictionary = Dictionary(**named, architecture=architecture, k=k)  # pyright: ignore[reportArgumentType]
    return check_dictionary(dictionary, str(where))


def _saelens(folder: Path) -> Stored:
    config, path = read_json(folder / CONFIG), folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has {CONFIG}, but no {WEIGHTS}: fetch it again")
    metadata = config.get("metadata") or config
    if not isinstance(metadata, dict):
        raise UserError(f"{folder / CONFIG}: metadata is {str(metadata)[:60]!r}, not an object: fetch it again")
    old_topk = config.get("activation_fn_str", config.get("activation_fn")) == "topk"  # before version 6
    architecture = "topk" if old_topk else config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{folder} holds a {architecture!r} dictionary, which is not supported"
            f"{nearest(str(architecture), _ARCHITECTURES)}"
        )
    if (normalised := config.get("normalize_activations") or "none") != "none":
        raise UserError(
            f"{folder} normalises activations ({normalised!r}), and the file has no factor for it: fold it into the "
            "weights with SAELens first"
        )
    arrays = _tensors(path)
    if architecture == "topk":
        more = config.get("activation_fn_kwargs")
        k = config.get("k") or (more.get("k") if isinstance(more, dict) else None)
        if not isinstance(k, int) or isinstance(k, bool):
            raise UserError(f"{folder / CONFIG}: k is {k!r}, not a whole number: fetch it again")
        dictionary = _built(arrays, path, "topk", k)
        if config.get("rescale_acts_by_decoder_norm"):
            norm = np.linalg.norm(arrays["W_dec"], axis=-1)
            dictionary = dictionary.replace(
                W_enc=dictionary.W_enc * norm, b_enc=dictionary.b_enc * norm, W_dec=dictionary.W_dec / norm[:, None]
            )
    else:
        dictionary = _built(arrays, path, "jumprelu")
    if config.get("apply_b_dec_to_input", True):  # the default before version 6
        dictionary = dictionary.replace(b_enc=dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc)
    place = None
    if metadata.get("site"):
        layer = metadata.get("layer")
        place = Place.parse(str(Place(str(metadata["site"]), layer if isinstance(layer, int) else None)))
    elif hook := metadata.get("hook_name") or metadata.get("hook_point"):
        place = Place.of_hook(str(hook))
    sparsity = _tensors(folder / SPARSITY).get("sparsity") if (folder / SPARSITY).is_file() else None
    return Stored(dictionary, place, metadata.get("model_fingerprint"), sparsity)


def _llama_scope(folder: Path) -> Stored:
    """Llama Scope's layout (arXiv 2410.20526), converted as SAELens does: the norm of its activations is folded in, and
    one threshold, which is in raw units, is scaled with it."""
    config, arrays = (
        read_json(folder / _LLAMA_SCOPE[0]),
        _tensors(folder / _LLAMA_SCOPE[1]),
    )
    try:
        factor = math.sqrt(config["d_model"]) / config["dataset_average_activation_norm"]["in"]
        threshold, hook = float(config["jump_relu_threshold"] * factor), str(config.get("hook_point_in", ""))
        weights = {
            "W_enc": arrays["encoder.weight"].T * factor,
            "b_enc": arrays["encoder.bias"],
            "W_dec": arrays["decoder.weight"].T / factor,
            "b_dec": arrays["decoder.bias"] / factor,
        }
    except KeyError as error:
        raise UserError(f"{folder} lacks {error} of Llama Scope's layout: fetch it again") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / _LLAMA_SCOPE[0]} has a number that cannot be used ({error}): fetch it again"
        ) from None
    latents = len(weights["b_enc"])
    dictionary = Dictionary(**weights, threshold=np.full(latents, threshold, np.float32), architecture="jumprelu")
    return Stored(dictionary, Place.of_hook(hook), None)


def _gemma_scope(path: Path) -> Stored:
    """Gemma Scope's layout (arXiv 2408.05147)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.float32) for name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays ({error}): fetch it again") from None
    return Stored(_built(arrays, path, "jumprelu"), None, None)


def _plain(path: Path, k: int | None) -> Stored:
    arrays = _tensors(path)
    if "threshold" not in arrays and k is None:
        raise UserError(f"{path} has no threshold and does not tell its k: say how many latents are active at once")
    encoder, decoder = (np.shape(arrays.get(name, np.zeros(0))) for name in ("W_enc", "W_dec"))
    if encoder == decoder != encoder[::-1]:  # rows are latents, as in PyTorch
        arrays["W_enc"] = arrays["W_enc"].T
    return Stored(_built(arrays, path, "jumprelu" if "threshold" in arrays else "topk", k), None, None)
