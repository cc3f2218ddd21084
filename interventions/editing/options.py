"""The options of P4's editors: which there are, where they sit, and how large they are."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro
from jaxtyping import PRNGKeyArray

from interventions.editing.editors import EDITORS, init_editors
from interventions.kinds.reft import EDITOR_KINDS, Editor, LoReFT
from vlm_jax import Model
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.ranges import Range, check_ranges

# The command line lists the names; static checkers cannot compute them.
if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[(*EDITOR_KINDS, "MoReS")]

#: Word -> the blocks or layers that it means, of all those that can have an editor, in order.
_WORDS = {
    "all": lambda numbers: numbers,
    "odd": lambda numbers: [number for number in numbers if number % 2],
    "even": lambda numbers: [number for number in numbers if number % 2 == 0],
    "first": lambda numbers: numbers[: len(numbers) // 2],
    "last": lambda numbers: numbers[len(numbers) // 2 :],
}


class Preset(NamedTuple):
    """The values of the options that are not given."""

    where: str
    """Of :data:`_WORDS`, for the vision blocks and the layers."""
    length: int
    visual_rank: int = 6
    rank: int = 4


#: P4's text and its released code, which differ.
PRESETS = {"paper": Preset("odd", 4), "repo": Preset("all", 6)}


@dataclasses.dataclass(frozen=True)
class EditorOptions:
    """Which editors there are, where they sit, and how large they are."""

    preset: Literal["paper", "repo"] = "paper"
    """The values of the options below that are not given. paper: an editor in every odd vision block and layer, which
    changes 4 tokens at either end; repo: the released code's, in every layer and in every vision block from 1 to the
    one that the projector reads, 6 tokens. Ranks are 6 and 4 in both."""
    kind: KindName = "LoReFT"
    """The editors' formula (docs/mrt.md). LoReFT is P4's. MoReS is LoReFT on the visual tokens in the decoder's layers
    and nowhere else."""
    editors: Annotated[tuple[str, ...], tyro.conf.arg(metavar="EDITOR [EDITOR ...]")] = ()
    """Which of P4's editors there are: visual (psi_V, in the vision blocks), cross (psi_c, behind the projector),
    prefix (psi_P) and suffix (psi_S, at both ends of the text). By default all four."""
    blocks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BLOCK [BLOCK ...]")] = ()
    """Vision blocks with an editor: numbers from 0, or one of all, odd, even, first and last (half) of the blocks from
    1 on."""
    layers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER [LAYER ...]")] = ()
    """Layers of the decoder with editors: numbers from 0, or one of all, odd, even, first and last (half)."""
    visual_rank: Annotated[int | None, Range(least=1)] = None
    """Rank of visual and cross."""
    rank: Annotated[int | None, Range(least=1)] = None
    """Rank of the editors in the layers."""
    length: Annotated[int | None, Range(least=1)] = None
    """How many tokens prefix and suffix change, each. If the text has fewer than twice as many, each changes half of
    them."""
    tied: bool = False
    """One editor in each layer for both ends of the text, instead of prefix and suffix."""

    def check_editors(self) -> None:
        """Raises a UserError for a name or number that no model can have."""
        check_ranges(self)
        for name in self.editors:
            if name not in EDITORS:
                raise UserError(f"unknown editor {name!r}{nearest(name, EDITORS)}")
        if len(set(self.editors)) < len(self.editors):
            raise UserError("--editors has a name twice: give each once")
        if self.kind == "MoReS" and (self.editors or self.tied):
            raise UserError("--kind MoReS has an editor of its own: drop --editors and --tied")
        if self.tied and self.editors and not {"prefix", "suffix"} <= set(self.editors):
            raise UserError("--tied needs prefix and suffix among --editors: add them, or drop --tied")
        for flag, words in (("blocks", self.blocks), ("layers", self.layers)):
            for word in words:
                if not (word.isdecimal() and len(word) < 6) and (word not in _WORDS or len(words) > 1):
                    raise UserError(f"--{flag} has {word!r}: give numbers, or one of {', '.join(_WORDS)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The editors' names (:data:`interventions.editing.editors.EDITOR_SITES`)."""
        if self.kind == "MoReS":
            return ("steering",)
        chosen = [name for name in EDITORS if name in (self.editors or EDITORS)]
        return (*(name for name in chosen if name not in ("prefix", "suffix")), "ends") if self.tied else tuple(chosen)

    def init(self, model: Model, key: PRNGKeyArray) -> dict[str, Editor]:
        """The untrained editors for a model.

        Raises:
            UserError: for editors, blocks, layers or ranks that the model cannot have.
        """
        self.check_editors()
        preset, depths = PRESETS[self.preset], model.depths
        return init_editors(
            model,
            kind=EDITOR_KINDS.get(self.kind, LoReFT),
            editors=self.names,
            visual_rank=preset.visual_rank if self.visual_rank is None else self.visual_rank,
            rank=preset.rank if self.rank is None else self.rank,
            blocks=_numbers(self.blocks or (preset.where,), range(1, depths["visual"])),
            layers=_numbers(self.layers or (preset.where,), range(depths["text"])),
            length=preset.length if self.length is None else self.length,
            key=key,
        )


def _numbers(words: Sequence[str], candidates: range) -> list[int]:
    (first, *_) = words
    return list(_WORDS[first](list(candidates))) if first in _WORDS else [int(word) for word in words]
