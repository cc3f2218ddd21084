"""An embedded model that starts from trained models of its own shape instead of random weights."""

import jax
import numpy as np

from vlm_jax import Model, load
from vlm_jax.checkpoints.leaves import leaf_name, named_leaves
from vlm_jax.checkpoints.precision import EMBEDDINGS
from vlm_jax.errors import UserError


def inherited(model: Model, tokenizer, decoder: str | None, tower: str | None) -> Model:
    """The model with the decoder's parameters of the model ``decoder``, and the vision tower's and the projector's of
    the model ``tower`` (embedded names or folders; None keeps those of ``model``).

    The two tokenisers may differ: a token that ``decoder`` lacks gets the mean embedding of the tokens in which
    ``decoder`` writes it.

    Raises:
        UserError: if a model has no vision tower or no tokeniser where one is needed, or other shapes.
    """
    given: dict[str, jax.Array] = {}
    if decoder is not None:
        source, processor = load(decoder)
        if processor is None:
            raise UserError(f"{decoder} has no tokeniser: name a model with one in --decoder")
        given |= {name: leaf for name, leaf in named_leaves(source).items() if name.startswith("text.")}
        rows = np.asarray(given[EMBEDDINGS])
        given[EMBEDDINGS] = jax.numpy.asarray(_embeddings(rows, processor.tokenizer, tokenizer))
    if tower is not None:
        source, _ = load(tower)
        if source.visual is None:
            raise UserError(f"{tower} has no vision tower: name a vision-language model in --tower")
        given |= {name: leaf for name, leaf in named_leaves(source).items() if name.startswith("visual.")}
    own = named_leaves(model)
    for name, leaf in given.items():
        if name not in own or own[name].shape != leaf.shape:
            shape = own[name].shape if name in own else "none"
            raise UserError(
                f"{name} is {leaf.shape} in the model to start from and {shape} here: name one of this shape"
            )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: given.get(leaf_name(path), leaf), model)


def _embeddings(rows: np.ndarray, old, new) -> np.ndarray:
    """The rows ``(V, D)`` of the tokens of ``old``, for the tokens of ``new``."""
    known = old.get_vocab()
    result = np.empty((len(new), rows.shape[1]), rows.dtype)
    for token, number in new.get_vocab().items():
        pieces = [known[token]] if token in known else old.convert_tokens_to_ids(_pieces(old, token))
        result[number] = rows[pieces].mean(0)
    return result


def _pieces(tokenizer, token: str) -> list[str]:
    """The tokens in which a tokeniser writes what another one writes as ``token``."""
    return [piece.value for piece in tokenizer.backend_tokenizer.model.tokenize(token)]
