"""Features that changed: latents whose direction an adaptation turned, and that are active on images (P2).

A dictionary that was adapted from another keeps the numbers of its latents, so latent f of both can be compared.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.dictionary import Dictionary
from interventions.diff.place import Place
from vlm_jax.errors import UserError

Energy = Literal["raw", "ratio", "share"]
#: Rows of a similarity matrix that are in memory at once.
_ROWS = 2048


class Rotation(NamedTuple):
    """How the decoder of an adapted dictionary differs from that of the one it began with."""

    cosine: Float[np.ndarray, " latents"]
    """Of a latent's direction before and after."""
    nearest: Int[np.ndarray, " latents"]
    """The latent before whose direction is most like the latent's after."""
    nearest_cosine: Float[np.ndarray, " latents"]
    """The cosine with it."""

    @property
    def relocated(self) -> float:
        """The share of latents whose nearest direction before is another latent's."""
        return float((self.nearest != np.arange(len(self.nearest))).mean())


def rotation(base: Dictionary, adapted: Dictionary) -> Rotation:
    """Compares two dictionaries latent by latent.

    Raises:
        UserError: if they have other shapes.
    """
    if np.shape(base.W_dec) != np.shape(adapted.W_dec):
        raise UserError(
            f"the dictionaries have {base.latents} latents of width {base.width} and {adapted.latents} of width "
            f"{adapted.width}: compare a dictionary with one that was adapted from it"
        )
    before, after = _unit(base.W_dec), _unit(adapted.W_dec)
    nearest, best = [], []
    for at in range(0, len(after), _ROWS):
        cosines = after[at : at + _ROWS] @ before.T
        nearest.append(cosines.argmax(1))
        best.append(cosines.max(1))
    return Rotation((before * after).sum(1), np.concatenate(nearest), np.concatenate(best))


def _unit(rows: Float[np.ndarray, "latents width"]) -> Float[np.ndarray, "latents width"]:
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def visual_energy(
    image: Float[np.ndarray, " latents"], text: Float[np.ndarray, " latents"] | None, kind: Energy
) -> Float[np.ndarray, " latents"]:
    """The visual energy of latents.

    Args:
        image: the mean squared code in the vision-language model, on prompts with pictures.
        text: the same in the text model, on the same prompts without pictures; None if it was not measured.
        kind: "raw": ``image`` (P2's code). "ratio": divided by ``text``, which counts as 1e-6 at least. "share":
            divided by the sum of both.

    Raises:
        UserError: if the text model's energy is needed but not known.
    """
    if kind == "raw":
        return image
    if text is None:
        raise UserError(f"--energy {kind} compares with the text model: give --text-model")
    if kind == "ratio":
        return image / np.maximum(text, 1e-6)
    return image / np.maximum(image + text, 1e-12)


def cosine_limits(
    cosines: Mapping[Place, Float[np.ndarray, " latents"]], percentile: float = 25.0, pooled: bool = False
) -> dict[Place, float]:
    """Place -> the largest cosine of an adapted latent: the ``percentile`` of its dictionary's cosines, or of those of
    all dictionaries together if ``pooled`` (as in P2's command)."""
    together = np.percentile(np.concatenate(list(cosines.values())), percentile)
    return {
        place: float(together if pooled else np.percentile(values, percentile)) for place, values in cosines.items()
    }


def adapted_latents(
    cosines: Mapping[Place, Float[np.ndarray, " latents"]],
    energies: Mapping[Place, Float[np.ndarray, " latents"]],
    limits: Mapping[Place, float],
    least_energy: float = 0.01,
) -> dict[Place, Bool[np.ndarray, " latents"]]:
    """The adapted latents of every dictionary: visual energy above ``least_energy``, and a cosine of at most the
    dictionary's limit (:func:`cosine_limits`)."""
    return {place: (energies[place] > least_energy) & (values <= limits[place]) for place, values in cosines.items()}
