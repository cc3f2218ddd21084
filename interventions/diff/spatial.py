"""Features of a kind of question: latents that are active more often on them than on neutral ones (P2)."""

from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float

from interventions.diff.quality import Sums


class Enrichment(NamedTuple):
    """How much more often latents are active on some questions (q) than on neutral ones (n). All are ``(latents,)``."""

    rate: Float[np.ndarray, " latents"]
    """Share of q's tokens on which a latent is active."""
    neutral: Float[np.ndarray, " latents"]
    """Share of n's tokens."""
    odds_ratio: Float[np.ndarray, " latents"]
    """Odds of being active on q's tokens, divided by those on n's. Half a token is added to each of the four counts, so
    it is finite."""
    p: Float[np.ndarray, " latents"]
    """Fisher's exact test, one-sided: the chance of so many active tokens among q's if both had one rate. Tokens of a
    prompt are not independent, so p is too small; the held-out half tells what it is worth."""
    q: Float[np.ndarray, " latents"]
    """p adjusted by Benjamini and Hochberg over all latents."""

    def selected(
        self, least_ratio: float, least_difference: float, level: float
    ) -> dict[str, Bool[np.ndarray, " latents"]]:
        """Name of a filter -> the latents that pass it."""
        return {
            "odds_ratio": self.odds_ratio >= least_ratio,
            "difference": self.rate - self.neutral >= least_difference,
            "q": self.q <= level,
        }


def enrichment(questions: Sums, neutral: Sums) -> Enrichment:
    """Compares the activity of latents on two sets of tokens, given as sums over one token group
    (:meth:`interventions.diff.quality.Sums.of`)."""
    a, b = np.asarray(questions.active), np.asarray(neutral.active)
    a_tokens, b_tokens = float(questions.count), float(neutral.count)
    with np.errstate(divide="ignore"):
        ratio = (a + 0.5) / (a_tokens - a + 0.5) / ((b + 0.5) / (b_tokens - b + 0.5))
    # Among all tokens, those of q are drawn; the chance of at least a active ones among them.
    p = scipy.stats.hypergeom.sf(np.round(a) - 1, round(a_tokens + b_tokens), np.round(a + b), round(a_tokens))
    p = np.clip(p, 0, 1)
    return Enrichment(a / a_tokens, b / b_tokens, ratio, p, scipy.stats.false_discovery_control(p))
