"""Loads the processor of a model's folder, and checks that tokeniser, image processor and model belong together."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from vlm_jax.config import Config, VisionConfig
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.files import read_json
from vlm_jax.processor import Processor, Tokenizer

TOKENIZER, OPTIONS, IMAGES = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
#: The files that can hold a vocabulary: transformers makes a tokeniser of an older one, too.
_VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json")
#: Words that every tokeniser can write and read.
_SENTENCE = "What colour is the cat?"
#: How far apart a black and a white pixel are after every published normalisation, with room around it.
_LEAST_CONTRAST, _MOST_CONTRAST = 0.25, 20.0


def fitting_processor(folder: Path, config: Config) -> Processor:
    """The processor of a model's folder.

    Raises:
        UserError: if its files cannot be loaded, or if they do not belong to the model.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{folder / TOKENIZER} is missing: fetch the folder again, whole")
    files = {name: read_json(folder / name) for name in (TOKENIZER, OPTIONS, IMAGES) if (folder / name).is_file()}
    length = files.get(OPTIONS, {}).get("model_max_length", 1)
    if isinstance(length, bool) or not isinstance(length, int | float) or not (length >= 1 and length % 1 == 0):
        raise UserError(f"{folder / OPTIONS}: model_max_length = {length!r} must be a whole number above 0: correct it")
    with _sentence_for(f"{folder}: the tokeniser or image processor cannot be loaded"):
        processor = FAMILIES[config.family].load_processor(folder)
    with _sentence_for(f"{folder / TOKENIZER} cannot be used"):
        _check_tokenizer(processor.tokenizer, config, folder)
        _check_added(processor.tokenizer, files.get(TOKENIZER, {}), folder / TOKENIZER)
        _check_named(processor.tokenizer, files.get(TOKENIZER), folder / OPTIONS)
    if config.vision is not None:
        with _sentence_for(f"{folder / IMAGES} makes nothing of a picture that the vision tower takes"):
            _check_images(processor.image_processor, config.vision, folder / IMAGES)
    return processor


@contextlib.contextmanager
def _sentence_for(problem: str) -> Iterator[None]:
    """Raises errors of other packages as a UserError. A field of another type can raise any, also a panic of Rust,
    which is no ``Exception``."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} ({reason}): repair it") from None


def _check_tokenizer(tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    where, size, chat = folder / TOKENIZER, config.text.vocab_size, FAMILIES[config.family].chat
    count = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not size / 2 <= count <= size:
        raise UserError(
            f"{where} has {count} tokens, but vocab_size = {size} in config.json: take the tokeniser of this model"
        )
    _check_reading(tokenizer, where)
    for token in filter(None, (chat.image, chat.placeholder, chat.image_end)):
        if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token)) != token:
            raise UserError(f"{where} lacks the token {token!r} of a {config.family}: take the tokeniser of this model")
    if config.vision is not None and (found := tokenizer.convert_tokens_to_ids(chat.image)) != config.image_token_id:
        raise UserError(
            f"{where}: {chat.image!r} is token {found}, but the image token is {config.image_token_id} in config.json: "
            "take the tokeniser of this model"
        )
    if config.vision is not None:
        ids = tokenizer(chat.image, add_special_tokens=False)["input_ids"]
        if list(ids) != [config.image_token_id]:
            raise UserError(
                f"{folder / OPTIONS}: {chat.image!r} is read as {len(ids)} tokens, not as the image token: remove "
                "split_special_tokens"
            )
    if config.vision is not None and (named := getattr(tokenizer, "image_token", chat.image)) != chat.image:
        raise UserError(f"{folder / OPTIONS}: image_token = {named!r} must be {chat.image!r}: correct it")
    for field, ids in (("eos_token_id", config.eos_token_ids), ("pad_token_id", (config.pad_token_id,))):
        for token in ids:
            text = tokenizer.convert_ids_to_tokens(token) if token < count else None
            if text is None or tokenizer.decode([token], skip_special_tokens=True):  # it would be seen in answers
                raise UserError(
                    f"{folder / 'config.json'} or generation_config.json: {field} = {token} ({text!r}) is no special "
                    f"token of {TOKENIZER}: correct one of them"
                )


def _check_added(tokenizer: Tokenizer, file: dict, where: Path) -> None:
    """Checks that added tokens have the ids of their file. If one does not fit, transformers numbers them anew."""
    for added in file.get("added_tokens", ()):
        token, number = added.get("content"), added.get("id")
        if not isinstance(token, str) or tokenizer.convert_tokens_to_ids(token) != number:
            raise UserError(f"{where}: the added token {token!r} cannot have id {number!r}: fetch it again")


def _check_named(tokenizer: Tokenizer, file: dict | None, where: Path) -> None:
    """Checks that tokens with a role, such as eos_token, are no ordinary words of the vocabulary."""
    if file is None:
        return
    added = {token.get("content") for token in file.get("added_tokens", ())}
    for token in tokenizer.all_special_tokens:
        if token.isalnum() and token not in added:
            raise UserError(f"{where} makes {token!r} a special token, which is an ordinary text: correct it")


def _check_reading(tokenizer: Tokenizer, where: Path) -> None:
    """Checks that a sentence becomes tokens, longer than characters, that stand for this sentence."""
    ids, whole = (tokenizer(_SENTENCE, add_special_tokens=special)["input_ids"] for special in (False, True))
    if "".join(tokenizer.decode(ids).split()) != "".join(_SENTENCE.split()):
        raise UserError(f"{where} reads {_SENTENCE!r} as {tokenizer.decode(ids)!r}: fetch the folder again, whole")
    if len(ids) >= len(_SENTENCE):
        raise UserError(f"{where} cuts words into single letters, so its merges are missing: fetch it again, whole")
    if whole not in (ids, [tokenizer.bos_token_id, *ids]):
        raise UserError(
            f"{where} begins or ends a text with other tokens than bos_token = {tokenizer.bos_token!r} of "
            "tokenizer_config.json: correct one of them"
        )


def _check_images(image_processor: Any, vision: VisionConfig, where: Path) -> None:
    vision.check_processor(image_processor, str(where))
    _check_normalisation(image_processor, vision.in_channels, where)
    # From black to white, and of a size that no tower takes as it is.
    greys = np.broadcast_to(np.linspace(0, 255, 70)[None, :, None], (50, 70, 3)).astype(np.uint8)
    picture = Image.fromarray(greys)
    arrays = image_processor(images=[picture], return_tensors="np")
    pixels = np.asarray(arrays["pixel_values"], np.float32)
    try:
        images, tokens = vision.images(pixels, arrays.get("image_grid_thw"))
    except UserError as error:
        raise UserError(f"{where} belongs to another vision tower ({error})") from None
    expected = vision.size_of(image_processor, picture)
    if (images.patch_mask.shape[1], *tokens) != expected:
        raise UserError(
            f"{where}: a picture of 70 x 50 pixels becomes {tokens[0]} visual tokens, not {expected[1]}: take the "
            "image processor of this model"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not _LEAST_CONTRAST <= high - low <= _MOST_CONTRAST:  # false for NaN, too
        raise UserError(
            f"{where}: a picture from black to white becomes numbers from {low:.3g} to {high:.3g}: correct do_rescale, "
            "rescale_factor or do_normalize"
        )


def _check_normalisation(image_processor: Any, channels: int, where: Path) -> None:
    """Checks the fields that say how pixels become numbers."""

    def check(valid: bool, field: str, expected: str) -> None:
        if not valid:
            value = getattr(image_processor, field, None)
            value = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{where}: {field} = {value!r} must be {expected}: correct it")

    for field in ("do_resize", "do_rescale", "do_normalize"):
        check(isinstance(getattr(image_processor, field, None), bool), field, "true or false")
    check(type(image_processor.resample) in (int, Resampling), "resample", "a whole number from 0 to 5")
    white = 255.0
    if image_processor.do_rescale:
        factor = image_processor.rescale_factor
        check(_is_number(factor) and factor > 0, "rescale_factor", "a finite number above 0")
        white *= factor
    if not image_processor.do_normalize:
        return
    for field in ("image_mean", "image_std"):
        values = getattr(image_processor, field)
        check(isinstance(values, list | tuple) and len(values) == channels, field, f"{channels} numbers")
        check(all(map(_is_number, values)), field, f"{channels} finite numbers")
    mean, std = image_processor.image_mean, image_processor.image_std
    check(all(0 <= number <= white for number in mean), "image_mean", f"numbers from 0 to {white:.4g}, as pixels are")
    spread = all(number > 0 and _LEAST_CONTRAST <= white / number <= _MOST_CONTRAST for number in std)
    check(spread, "image_std", f"the deviations of numbers from 0 to {white:.4g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
