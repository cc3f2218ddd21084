"""Activations at some sites and layers, token by token: computed when they are needed, or written to disk once.

The tokens of a block of examples are computed together. So the unit that is computed, written and read is the block,
and shuffling takes as much memory as the blocks in its buffer.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from interventions.kinds.groups import GROUPS, bind, check_group, label, tokens_of
from vlm_jax import Inputs, Model
from vlm_jax.acting import acting
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches, encode
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.ranges import BATCH, Range
from vlm_jax.sites import BLOCK_SITES, TEXT_SITES, Intervention, layered, stage, token_axis

#: Sites whose values have an entry for each token of the prompt or, in the vision tower, for each patch.
_SITES = TEXT_SITES - {"text.deepstack"} | BLOCK_SITES | {"visual.embeddings"}


class Index(NamedTuple):
    """Which token each row is. All arrays are ``(rows,)``."""

    block: Int32[np.ndarray, " rows"]
    """The block that holds the row."""
    example: Int32[np.ndarray, " rows"]
    """The number of the example."""
    token: Int32[np.ndarray, " rows"]
    """The token's position in the prompt; at sites of the vision tower, the patch's in the tower's sequence."""
    group: Int32[np.ndarray, " rows"]
    """The token's group, as an index into :data:`interventions.GROUPS`. Patches are of the group image."""
    token_id: Int32[np.ndarray, " rows"]
    """The token's id; -1 for patches."""

    def among(self, groups: str) -> Bool[np.ndarray, " rows"]:
        """The rows of a token group."""
        return tokens_of(groups, self.group[None])[0]


class Source(Protocol):
    """Activations that can be read block by block."""

    @property
    def index(self) -> Index: ...

    def read(self, block: int) -> dict[str, Float[np.ndarray, "layers rows width"]]:
        """Site -> the activations of a block's rows."""
        ...

    def number(self, layer: int | None) -> int:
        """The number of a layer in these arrays; 0 for None, a site outside of the layers."""
        ...


@dataclasses.dataclass(frozen=True)
class ActivationOptions:
    """Which activations are read."""

    sites: tuple[str, ...] = ("text.resid_post",)
    """Sites of the text model (docs/interventions.md), such as text.resid_post, text.attn_out or text.mlp_out; or sites
    of the vision tower, such as visual.resid_post."""
    layers: Annotated[tuple[int, ...] | None, Range(least=0)] = None
    """Layers of these sites. By default all."""
    tokens: str = "all"
    """The token group whose activations are read: all, image, text, question, or several joined by +. The vision tower
    has patches instead; there it is all."""
    activation_batch: Annotated[int, BATCH] = 32
    """Examples that are run at once. Their activations are a block, the unit that is kept in memory."""

    def check_activations(self, model: Model) -> None:
        """Raises a UserError for a site, layer or token group that the model lacks."""
        check_group(self.tokens)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError(f"--sites is {' '.join(self.sites) or 'empty'}: name at least one, and none twice")
        for site in self.sites:
            stage(site)
            if site not in _SITES or token_axis(site) != 1:
                raise UserError(f"{site} has no activation for each token or patch: use a site like text.resid_post")
        if len({site.partition(".")[0] for site in self.sites}) > 1:
            raise UserError("--sites names the text model and the vision tower: train each by itself")
        if self.of_patches and self.tokens != "all":
            raise UserError(f"--tokens {self.tokens} are not in the vision tower, which has patches: drop it")
        if self.of_patches and model.visual is None:
            raise UserError(f"{self.sites[0]} is in the vision tower, which a text-only model lacks: use a text site")
        chosen, depth = self.layers_of(model), model.depths[self.tower]
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(depth)):
            raise UserError(f"--layers {' '.join(map(str, chosen))} is not possible: name some of 0 to {depth - 1}")
        if self.layers is not None and not any(map(layered, self.sites)):
            raise UserError(
                f"--layers has no meaning at {' '.join(self.sites)}, which is outside of the layers: drop it"
            )

    @property
    def tower(self) -> str:
        """The part of the model in which the sites are, "text" or "visual"."""
        return self.sites[0].partition(".")[0]

    @property
    def of_patches(self) -> bool:
        """Whether the activations are those of patches in the vision tower."""
        return self.tower == "visual"

    def layers_of(self, model: Model) -> tuple[int, ...]:
        """The layers of sites that are in the layers."""
        return tuple(range(model.depths[self.tower])) if self.layers is None else self.layers


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """Activations that the model computes whenever they are read.

    blocks: the numbers of the examples in each block. Their prompts have similar lengths.
    interventions: those that act on the model.
    """

    model: Model
    processor: Processor
    examples: Sequence[Example]
    options: ActivationOptions
    blocks: list[list[int]]
    index: Index
    interventions: tuple[Intervention, ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        processor: Processor,
        examples: Sequence[Example],
        options: ActivationOptions,
        interventions: tuple[Intervention, ...] = (),
    ) -> "Computed":
        """The activations of the examples' prompts, without answers.

        Raises:
            UserError: if no example has a token of the group.
        """
        options.check_activations(model)
        blocks, parts = [], []
        for rows, batch in batches(examples, processor, model.config, options.activation_batch, with_answer=False):
            found = _found(model, batch, [examples[row] for row in rows], options)
            at, token = np.nonzero(found.marked)
            if not len(at):
                continue
            block = np.full(len(at), len(blocks))
            example = np.asarray(rows)[found.row[at]]
            parts.append((block, example, token, found.group[found.marked], found.ids[found.marked]))
            blocks.append(rows)
        if not blocks:
            if options.of_patches:
                raise UserError(f"no example has a picture, whose patches {options.sites[0]} needs: give other tasks")
            raise UserError(f"no example has a token of the group {options.tokens!r}: choose another --tokens")
        index = Index(*(np.concatenate(arrays).astype(np.int32) for arrays in zip(*parts, strict=True)))
        return cls(model, processor, examples, options, blocks, index, interventions)

    def read(self, block: int) -> dict[str, Float[np.ndarray, "layers rows width"]]:
        found, batch = self._found(block)
        always = acting(bind(self.interventions, batch), self.model.depths)
        values = fetch(tapped(self.model, batch.inputs, self.options.sites, self.layers, always))
        return {site: value[:, found.marked] for site, value in values.items()}

    def token_ids(self, block: int) -> Int32[np.ndarray, " rows"]:
        """The token id of each row of a block."""
        found, _ = self._found(block)
        return found.ids[found.marked]

    def _found(self, block: int) -> tuple["_Found", Batch]:
        """What is read of a block, and its prompts."""
        chosen, batch = self._batch(block)
        return _found(self.model, batch, [self.examples[row] for row in chosen], self.options), batch

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of sites that are in the layers."""
        return tuple(self.options.layers_of(self.model))

    def number(self, layer: int | None) -> int:
        return 0 if layer is None else self.layers.index(layer)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site -> the number of its layers and the width of its activations."""
        _, batch = self._batch(0)
        values = jax.eval_shape(lambda: tapped(self.model, batch.inputs, self.options.sites, self.layers))
        return {site: (value.shape[0], value.shape[-1]) for site, value in values.items()}

    def _batch(self, block: int) -> tuple[list[int], Batch]:
        """The examples of a block, and their prompts, filled up to a whole batch."""
        rows = self.blocks[block]
        chosen, size = [self.examples[row] for row in rows], self.options.activation_batch
        filled = chosen + chosen[-1:] * (size - len(chosen))
        batch = encode(filled, self.processor, self.model.config, with_answer=False)
        return rows, batch


class _Found(NamedTuple):
    """The tokens of a batch whose activations are read; at sites of the vision tower, the patches of its images."""

    marked: Bool[np.ndarray, "sequences tokens"]
    row: Int[np.ndarray, " sequences"]
    """The row of the batch to which each sequence belongs."""
    group: Int32[np.ndarray, "sequences tokens"]
    ids: Int32[np.ndarray, "sequences tokens"]


def _found(model: Model, batch: Batch, examples: Sequence[Example], options: ActivationOptions) -> _Found:
    """What is read of a batch whose first rows are the examples. The other rows only fill it."""
    if not options.of_patches:
        labels = label(batch)
        rows = np.arange(len(labels))
        marked = tokens_of(options.tokens, labels) & (rows < len(examples))[:, None]
        return _Found(marked, rows, labels, np.asarray(batch.inputs.input_ids))
    images, vision = batch.inputs.images, model.config.vision
    assert vision is not None, "check_activations has refused text-only models"
    patches = np.zeros((0, 0), bool) if images is None else np.asarray(images.patch_mask)
    real = np.pad(patches, [(0, 0), (vision.class_tokens, 0)], constant_values=True)
    # The examples' images come first, in their order.
    row = np.full(len(real), len(examples))
    owners = np.repeat(np.arange(len(examples)), [len(example.images) for example in examples])
    row[: len(owners)] = owners
    group, none = np.full(real.shape, GROUPS.index("image"), np.int32), np.full(real.shape, -1, np.int32)
    return _Found(real & (row < len(examples))[:, None], row, group, none)


@functools.partial(jax.jit, static_argnames=("sites", "layers"))
def tapped(
    model: Model,
    inputs: Inputs,
    sites: tuple[str, ...],
    layers: tuple[int, ...],
    interventions: tuple[Intervention, ...] = (),
) -> dict[str, jax.Array]:
    """Site -> the values of the layers, ``(layers, batch, tokens, width)``; at sites of the vision tower
    ``(layers, images, patches, width)``. Heads are joined."""
    taps = {site: layers if layered(site) else None for site in sites}
    values = model(inputs, interventions, taps=taps).taps
    values = {site: value if layered(site) else value[None] for site, value in values.items()}
    return {site: value.reshape(*value.shape[:3], -1).astype(jnp.float32) for site, value in values.items()}


class Shuffled:
    """Batches of activations in random order: a pure function of the step, so that a stopped training goes on with the
    same data.

    In every epoch the blocks come in a new random order. ``buffer`` blocks at a time are in memory. Their rows are
    shuffled and cut into batches; what does not fill a batch is left out.
    """

    def __init__(self, source: Source, batch: int, *, tokens: str = "all", buffer: int = 16, seed: int = 0):
        self.source, self.batch, self.buffer, self.seed = source, batch, buffer, seed
        self.rows = np.flatnonzero(source.index.among(tokens))
        if len(self.rows) < batch:
            raise UserError(
                f"there are {len(self.rows)} activations of the tokens {tokens!r}, but a batch has {batch}: give more "
                "examples or a smaller --batch"
            )
        self.counts = np.bincount(source.index.block[self.rows], minlength=int(source.index.block.max()) + 1)

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The blocks of each window of an epoch. A window has ``buffer`` blocks, or more if they do not fill a
        batch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        parts, begin = [], 0
        for end in range(1, len(order) + 1):
            if end - begin >= self.buffer and self.counts[order[begin:end]].sum() >= self.batch:
                parts.append(order[begin:end])
                begin = end
        rest = order[begin:]
        if self.counts[rest].sum() >= self.batch:
            return [*parts, rest]
        return [*parts[:-1], np.concatenate([*parts[-1:], rest])]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (there are few of these objects)
    def _steps(self, epoch: int) -> np.ndarray:
        """The step, counted in the epoch, at which each window begins, and the number of steps of the epoch."""
        sizes = [self.counts[blocks].sum() // self.batch for blocks in self.windows(epoch)]
        return np.concatenate([[0], np.cumsum(sizes)])

    def steps(self, epochs: int) -> int:
        """The number of steps of the first epochs."""
        return sum(int(self._steps(epoch)[-1]) for epoch in range(epochs))

    def place(self, step: int) -> tuple[int, int, int]:
        """The epoch, window and batch within the window of a step."""
        epoch = 0
        while step >= (steps := int(self._steps(epoch)[-1])):
            assert steps, "the first window of an epoch fills a batch"
            step, epoch = step - steps, epoch + 1
        window = int(np.searchsorted(self._steps(epoch), step, side="right")) - 1
        return epoch, window, step - int(self._steps(epoch)[window])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _window(self, epoch: int, window: int) -> dict[str, Float[np.ndarray, "layers rows width"]]:
        """The rows of a window in random order."""
        block_of, parts = self.source.index.block, []
        wanted = np.isin(np.arange(len(block_of)), self.rows)
        for block in map(int, self.windows(epoch)[window]):
            kept = wanted[block_of == block]
            parts.append({site: values[:, kept] for site, values in self.source.read(block).items()})
        joined = {site: np.concatenate([part[site] for part in parts], 1) for site in parts[0]}
        order = self._order(epoch, window)
        return {site: values[:, order] for site, values in joined.items()}

    def _order(self, epoch: int, window: int) -> np.ndarray:
        """The random order of a window's rows, whose blocks follow one another."""
        return np.random.default_rng([self.seed, epoch, window]).permutation(
            self.counts[self.windows(epoch)[window]].sum()
        )

    def images(self, step: int) -> Bool[np.ndarray, " batch"]:
        """Which of a step's tokens are visual tokens."""
        epoch, window, number = self.place(step)
        block_of, own = self.source.index.block[self.rows], self.source.index.among("image")[self.rows]
        marks = np.concatenate([own[block_of == block] for block in self.windows(epoch)[window]])
        return marks[self._order(epoch, window)][number * self.batch : (number + 1) * self.batch]

    def __call__(self, step: int) -> dict[str, Float[np.ndarray, "layers batch width"]]:
        """Site -> the activations of a step's tokens."""
        epoch, window, number = self.place(step)
        at = slice(number * self.batch, (number + 1) * self.batch)
        return {site: values[:, at] for site, values in self._window(epoch, window).items()}
