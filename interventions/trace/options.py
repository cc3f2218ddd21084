"""How a task is traced: every choice that the paper leaves open is an option."""

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from interventions.engine.grids import layer_windows
from interventions.kinds.groups import check_positions
from interventions.trace.corruption import CORRUPTIONS, CorruptionName
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.ranges import BATCH, Range, check_ranges


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """How a task is traced. The defaults are P0's, or ours for options that P0 does not mention."""

    corruption: CorruptionName = "question_noise"
    """How the prompt is corrupted. Noise on the embeddings of the question (P0; of its subject, where the data name
    one) or of the image, DeepStack included; the question or the image of another sample; the mean image embedding;
    blurred pixels."""
    noise_scale: Annotated[float, Range(above=0)] = 2.0
    """How strong the noise is: its standard deviation is noise_scale * sigma_E (s in P0's equation 5)."""
    sigma: Literal["sequence", "question", "vocabulary"] = "sequence"
    """The embeddings whose standard deviation is sigma_E: those of all tokens of the task's prompts (P0), those of
    their question tokens (of their subjects, where the data name them), or the whole embedding table. The sigmas of
    DeepStack's noise are measured separately."""
    replicates: Annotated[int, Range(least=1)] = 1
    """How often every sample is corrupted, each time with other noise. All cells see the same noise."""
    positions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP [GROUP ...]")] = ("all",)
    """The tokens that a patch restores: all (P0), or token groups such as question, last, image, answer, or ROME's
    roles: first_subject, middle_subject, last_subject, next, further, last. Each group is patched separately; samples
    without such a token do not count in its cells. each (interventions.trace only): as all, and of some samples every
    token by itself, for the result page (eval.page); this takes 2 x layers x tokens patches a sample."""
    window: Annotated[int, Range(least=1)] = 1
    """How many neighbouring layers a patch restores at once (P0: 1; ROME: 10)."""
    heads: bool = False
    """Patch every attention head separately, instead of the outputs of attention and MLP."""
    patch: Literal["run", "zero", "mean", "resample"] = "run"
    """What a patch puts in place of a cell's values. run: those of the other run (P0); zero: zeros; mean: the mean over
    the samples, or those of --reference, at tokens of the same group; resample: those of another sample, chosen by
    --trace-seed, at tokens of the same group."""
    direction: Literal["restore", "break"] = "restore"
    """Into which run patches are put. restore: the corrupted one, and IE is how much the metric rises (P0); break: the
    clean one, and IE is how much it falls. TE is the same in both, so RR is the share of TE."""
    metric: Annotated[
        Literal["probability", "log_probability", "logit_difference"], tyro.conf.arg(name="trace-metric")
    ] = "probability"
    """The metric whose differences are TE and IE: the geometric mean probability of the gold tokens (P0); their mean
    log-probability; or the logit of the gold answer minus the logit of a wrong one, where the two first differ."""
    gold: Literal["commonest", "shortest", "longest"] = "commonest"
    """Which of a sample's answers is scored. commonest: the one that most annotators gave, or else the first."""
    correct_only: bool = False
    """Trace only samples whose gold tokens greedy decoding would write. What it would write after them does not
    matter."""
    min_te: Annotated[float, Range(least=-1, most=1)] = 0.01
    """Samples whose TE is below this, in the metric's units, do not count in RR: dividing by a tiny TE adds noise."""
    eps: Annotated[float, Range(least=0)] = 1e-8
    """Added to TE before IE is divided by it (epsilon in P0's equation 4)."""
    statistic: Literal["mean_of_ratios", "ratio_of_means", "median"] = "mean_of_ratios"
    """How RR sums up the samples in the ranking: mean of IE / TE (P0), mean IE / mean TE, or median of IE / TE."""
    batch: Annotated[int, BATCH, tyro.conf.arg(name="trace-batch")] = 16
    """Samples that are traced at once. Larger batches are faster and need more memory; results do not change."""
    seed: Annotated[int, Range(least=0), tyro.conf.arg(name="trace-seed")] = 0
    """Seed of the noise and of the swaps. A sample's noise and swap do not depend on its batch."""

    def check(self, depth: int) -> None:
        """Checks the options for a model with ``depth`` layers.

        Raises:
            UserError: for an unknown name, a number outside its range, or options that exclude each other.
        """
        check_ranges(self)
        for field in dataclasses.fields(TraceOptions):
            choices, value = _choices(field.type), getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"unknown {field.name} {value!r}{nearest(str(value), choices)}")
        if not self.positions or len(set(self.positions)) < len(self.positions):
            named = " ".join(self.positions) or "empty"
            raise UserError(f"--positions is {named}: give at least one token group, such as all, each once")
        if "each" in self.positions and (len(self.positions) > 1 or self.heads or self.metric != "probability"):
            raise UserError("--positions each goes with no other group, --heads or --trace-metric: drop them")
        if "each" in self.positions and (self.patch != "run" or self.direction != "restore"):
            raise UserError("--positions each restores values of the clean run: drop --patch and --direction")
        if self.patch != "run" and self.direction == "restore":
            raise UserError(f"--patch {self.patch} restores nothing: give --direction break to ablate the clean run")
        for group in self.groups:
            check_positions(group)
        layer_windows(depth, self.window)
        if self.replicates > 1 and not CORRUPTIONS[self.corruption].random:
            raise UserError(
                f"--corruption {self.corruption} is not random, so replicates would be equal: drop --replicates"
            )

    @property
    def rate(self) -> str:
        """What RR is called in titles."""
        return "restoration rate" if self.direction == "restore" else "share of TE lost"

    @property
    def groups(self) -> tuple[str, ...]:
        """The token groups that cells restore."""
        return ("all",) if self.positions == ("each",) else self.positions

    def check_modules(self) -> None:
        """Checks that the cells are modules, because LoRA is placed in modules.

        Raises:
            UserError: if the cells are heads or token groups.
        """
        if self.positions == ("each",):
            raise UserError(
                "placing LoRA needs one RR for each module: --positions each belongs to interventions.trace"
            )
        if self.direction != "restore":
            raise UserError("placing LoRA needs how much modules restore: drop --patch and --direction break")
        if self.heads or len(self.positions) > 1:
            raise UserError("placing LoRA needs one RR for each module: drop --heads, give one group of --positions")


def _choices(annotation: Any) -> tuple:
    """The values of a ``Literal``, annotated or not; none of another type."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()
