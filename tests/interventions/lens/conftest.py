"""A tiny model of every family, and what transformers has at every site of it, made once a session."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hf_oracle import oracle_sites
from kind_cases import FAMILIES, Case


@dataclasses.dataclass
class Observed:
    """A case, and transformers' values at its sites for its left-padded batch, of which every row is read at one token:
    the last of an image, where DeepStack adds something, or the last of a row without images."""

    case: Case
    sites: dict[str, Any]
    at: np.ndarray
    word: np.ndarray
    foil: np.ndarray

    @property
    def decoder(self):
        return self.case.oracle.model.language_model

    def seen(self, site):
        """The values of those tokens, ``(layers, B, ...)`` or ``(B, ...)``, as float64."""
        values, rows = np.asarray(self.sites[site], np.float64), np.arange(len(self.at))
        return values[rows, self.at] if values.ndim == 3 else values[:, rows, self.at]

    def tensor(self, name):
        """A parameter of transformers' model, as float64."""
        return dict(self.case.oracle.named_parameters())[name].detach().double().numpy()

    def gain(self, name):
        """What a norm multiplies by: Gemma's parameters are offsets from 1."""
        return self.tensor(name) + (self.case.config.model_type == "gemma3")

    @property
    def direction(self):
        """The difference of two words' rows of the unembedding ``(B, D)``."""
        weight = self.tensor("lm_head.weight")
        return weight[self.word] - weight[self.foil]


@pytest.fixture(scope="session")
def observed_of(tmp_path_factory):
    made = {}

    def observe(family):
        if family not in made:
            case = Case(family, tmp_path_factory.mktemp(family))
            real, image = case.real["left"], case.masks["left"]["image"]
            place = np.arange(real.shape[1])
            at = np.where(image.any(1), (place * image).max(1), (place * real).max(1))
            with torch.no_grad():
                sites = oracle_sites(case.oracle, case.batches["left"])
            made[family] = Observed(case, sites, at, np.array([11, 12, 13]), np.array([7, 8, 9]))
        return made[family]

    return observe


@pytest.fixture(params=FAMILIES)
def observed(request, observed_of):
    return observed_of(request.param)
