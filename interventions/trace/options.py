"""How a task is traced: everything that the paper leaves open is an option."""

import dataclasses
from typing import Annotated, Literal, get_args, get_origin

import tyro

from interventions.engine.grids import layer_windows
from interventions.kinds.groups import members
from interventions.trace.corruption import CORRUPTIONS
from vlm_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """How a task is traced. Every default is P0's choice, or ours where P0 is silent."""

    corruption: Literal[tuple(CORRUPTIONS)] = "question_noise"
    """How the prompt is corrupted: noise on the question's embeddings (P0) or on the image's, DeepStack included;
    another sample's question or image; the mean image embedding; blurred pixels."""
    noise_scale: float = 2.0
    """s of equation 5: noise has standard deviation s * sigma_E."""
    sigma: Literal["sequence", "question", "vocabulary"] = "sequence"
    """What sigma_E is measured on: all real tokens of the task's prompts (P0), their question tokens, or the embedding
    table. DeepStack's noise has sigmas of its own."""
    replicates: int = 1
    """Independent corruptions of every sample; all cells of a replicate meet the same one."""
    positions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP [GROUP ...]")] = ("all",)
    """Tokens that a patch restores: all (P0), or groups such as question, last, image, answer; several are patched
    apart."""
    window: int = 1
    """Layers that a patch restores at once, around each layer (P0: 1; ROME: 10)."""
    heads: bool = False
    """Patch every attention head apart instead of attention and MLP outputs."""
    metric: Literal["probability", "log_probability", "logit_difference"] = "probability"
    """What TE and IE are differences of: the geometric mean probability of the gold tokens (P0), their mean
    log-probability, or the logit of the gold answer minus that of a foil where the two first differ."""
    gold: Literal["commonest", "shortest", "longest"] = "commonest"
    """Which of several gold answers is forced; the first where none is commonest."""
    correct_only: bool = False
    """Trace only samples whose gold tokens greedy decoding would write, whatever it writes behind them."""
    min_te: float = 0.01
    """Samples whose TE, in the metric's units, is below this do not enter RR: the ratio would be noise over noise."""
    eps: float = 1e-8
    """eps of equation 4."""
    statistic: Literal["mean_of_ratios", "ratio_of_means", "median"] = "mean_of_ratios"
    """How samples are summed up in the ranking: mean of IE / TE (P0), mean IE / mean TE, or median of IE / TE."""
    batch: int = 16
    """Samples per compiled call."""
    seed: int = 0
    """Seed of the noise and the swaps; a sample's do not depend on the batch that it is in."""

    def check(self, depth: int) -> None:
        """Refuses options that cannot be."""
        for field in dataclasses.fields(TraceOptions):
            known, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in known:
                raise UserError(f"unknown {field.name} {value!r}{nearest(str(value), known)}")
        for name, least in (("batch", 1), ("replicates", 1), ("seed", 0), ("eps", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least {least}")
        if not 0 < self.noise_scale < float("inf"):
            raise UserError(f"--noise-scale is {self.noise_scale}: give a number above 0")
        if not self.positions or len(set(self.positions)) < len(self.positions):
            named = " ".join(self.positions) or "empty"
            raise UserError(f"--positions is {named}: give at least one token group, such as all, each once")
        for group in self.positions:
            members(group)
        layer_windows(depth, self.window)
        if self.replicates > 1 and not CORRUPTIONS[self.corruption].random:
            raise UserError(f"--corruption {self.corruption} leaves nothing to chance: drop --replicates")

    def check_modules(self) -> None:
        """Refuses options whose cells are not modules, for what places LoRA by them."""
        if self.heads or len(self.positions) > 1:
            raise UserError("placing LoRA needs one RR a module: drop --tracing.heads, give one of --tracing.positions")
