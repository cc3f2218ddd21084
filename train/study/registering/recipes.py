"""The conditions that P1's study of Registering compares, and the numbers that the paper reports."""

import dataclasses
from typing import Literal

from vlm_jax.registers import Mask

Data = Literal["captions", "questions", "both"]
#: The condition that is not trained.
WHOLE = "whole model"
_DATA: tuple[Data, ...] = ("captions", "both", "questions")
_COUNTS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What text may read of a picture in one condition, and on what the model is trained.

    data: None if it is not trained. registers: their number behind each picture; None for none. reduced: instead of
    registers, the picture is made of ``count`` tokens, without training: means of neighbouring visual tokens, or the
    visual tokens to which text attends most.
    """

    section: str
    data: Data | None = None
    registers: int | None = None
    mask: Mask = "register"
    reduced: Literal["pooled", "most attended"] | None = None
    count: int = 0

    @property
    def name(self) -> str:
        trained = {"captions": "captions", "questions": "questions", "both": "captions and questions"}
        if self.reduced is not None:
            return f"{self.count} {self.reduced}"
        if self.data is None:
            return WHOLE
        plural = "" if self.registers == 1 else "s"
        what = "plain tuning" if self.registers is None else f"{self.registers} register{plural}, {self.mask}"
        return f"{what}, {trained[self.data]}"


CONDITIONS = (
    Condition("without training"),
    *(Condition("without training", reduced="pooled", count=count) for count in _COUNTS),
    *(Condition("without training", reduced="most attended", count=count) for count in _COUNTS),
    *(Condition("plain tuning", data) for data in _DATA),
    *(Condition(f"registers, {data}", data, count) for data in _DATA for count in _COUNTS),
    *(Condition("other masks", "both", 4, mask) for mask in ("mitre", "gist", "none", "blind")),
)

REPORTED = {"MMBench": {"plain tuning": 0.392, "16 registers": 0.246, "256 registers": 0.253}}
"""The paper's table 2: Qwen2.5-VL-3B, tuned on captions alone."""
