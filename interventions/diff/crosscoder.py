"""What a crosscoder reads: the activations of the same tokens in two models, side by side.

A crosscoder (Lindsey et al. 2024) is a dictionary of such pairs: each latent has one direction in each model. Trained
with BatchTopK (Minder et al. 2025), it is the modern way to compare two models, and needs no adaptation.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from interventions.dictionary import Dictionary
from interventions.diff.activations import ActivationOptions, Computed, Index
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor

#: The tokens that both models read, though one sees no picture.
TOKENS = "question"


@dataclasses.dataclass(frozen=True, eq=False)
class Paired:
    """The activations of the questions' tokens in a model that reads the questions alone, and in one that also sees the
    pictures. Each model's are divided by their standard deviation, so that both count alike.

    scales: site -> the standard deviations, ``(2, layers)``.
    """

    blind: Computed
    seeing: Computed
    scales: dict[str, Float[np.ndarray, "models layers"]]

    @classmethod
    def of(
        cls,
        blind: tuple[Model, Processor],
        seeing: tuple[Model, Processor],
        examples: Sequence[Example],
        options: ActivationOptions,
        scales: dict[str, Float[np.ndarray, "models layers"]] | None = None,
    ) -> "Paired":
        """The pairs of two models.

        Args:
            scales: those of the pairs on which a crosscoder was trained; None measures them in the first block.

        Raises:
            UserError: if the models read a question as different tokens.
        """
        options = dataclasses.replace(options, tokens=TOKENS)
        second = Computed.of(*seeing, examples, options)
        alone = [example.without_images() for example in examples]
        first = dataclasses.replace(Computed.of(*blind, alone, options), blocks=second.blocks)
        for block in range(len(second.blocks)):
            if not np.array_equal(first.token_ids(block), second.token_ids(block)):
                raise UserError(
                    "the two models read the same questions as different tokens: compare stages of one model"
                )
        if scales is None:
            parts = first.read(0), second.read(0)
            scales = {
                site: np.stack([np.sqrt(part[site].var(1).mean(-1)) for part in parts]).astype(np.float32)
                for site in parts[0]
            }
        return cls(first, second, scales)

    def read(self, block: int) -> dict[str, Float[np.ndarray, "layers rows width"]]:
        """Site -> both models' activations, one behind the other along the width."""
        parts = self.blind.read(block), self.seeing.read(block)
        return {
            site: np.concatenate(
                [part[site] / scale[:, None, None] for part, scale in zip(parts, scales, strict=True)], axis=-1
            )
            for site, scales in self.scales.items()
        }

    @property
    def index(self) -> Index:
        return self.seeing.index

    @property
    def blocks(self) -> list[list[int]]:
        return self.seeing.blocks

    @property
    def examples(self) -> Sequence[Example]:
        return self.seeing.examples

    @property
    def options(self) -> ActivationOptions:
        return self.seeing.options

    def number(self, layer: int | None) -> int:
        return self.seeing.number(layer)


def second_share(crosscoder: Dictionary) -> Float[np.ndarray, " latents"]:
    """For each latent, the length of its direction in the second model, divided by the sum of its lengths in both: 0 if
    it belongs to the first model alone, 1 to the second, about 0.5 if the two share it."""
    halves = np.split(np.asarray(crosscoder.W_dec), 2, axis=1)
    first, second = (np.linalg.norm(half, axis=1) for half in halves)
    return second / np.maximum(first + second, 1e-12)
