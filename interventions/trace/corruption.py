"""Ways to corrupt a prompt before its first layer. A causal trace restores parts of the corrupted run.

A corruption is a function from a :class:`Case` to the embeddings and DeepStack tensors of the corrupted run. A sample's
noise depends only on the seed, its id, the replicate and the token, so batches, padding and devices do not change it.
The sample with which another is swapped depends only on the seed, the ids and the replicate, not on the order of the
samples.
"""

import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key
from PIL import ImageFilter

from interventions.kinds.add import Add
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.data.metrics import normalise
from vlm_jax.errors import UserError
from vlm_jax.model import Embedded
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, encode
from vlm_jax.runs.processes import fetch, gathered
from vlm_jax.typing import Array, ArrayLike

#: The radius of ``blurred_image``'s blur, as a share of the image's longer side.
_BLUR = 1 / 16


@flax.struct.dataclass
class Survey:
    """Statistics of a whole task that corruptions need; A field is None if no sample has an image, or if the model
    has no DeepStack."""

    sigma: dict[str, float]
    """Standard deviation of the embeddings: over all ``sequence`` tokens (P0's sigma_E), over the ``question`` tokens
    (those of the subject, where the example names one), and over the ``vocabulary``."""
    deepstack_sigma: Float[np.ndarray, "levels"] | None
    """Standard deviation of each DeepStack tensor."""
    mean_image: Float[np.ndarray, "width"] | None
    """The mean embedding of image tokens."""
    mean_deepstack: Float[np.ndarray, "levels width"] | None
    """The mean row of each DeepStack tensor at image tokens."""


class Moments:
    """Accumulates the mean and the standard deviation over the first axis of arrays that are added one by one."""

    def __init__(self):
        self.count, self.total, self.square = 0, np.zeros(()), np.zeros(())

    def add(self, x: Float[np.ndarray, "rows ..."]) -> None:
        """Adds the rows of ``x``."""
        x = np.asarray(x, np.float64)
        self.count, self.total, self.square = self.count + len(x), self.total + x.sum(0), self.square + (x**2).sum(0)

    @property
    def _sums(self) -> tuple:
        return self.total, self.square

    def joined(self) -> "Moments":
        """The moments of the rows of all processes.

        The processes of a team add the same rows. All teams have the same number of processes, so mean and standard
        deviation are still right.
        """
        merged = Moments()
        for count, *sums in gathered([self.count, *(np.asarray(part).tolist() for part in self._sums)]):
            if count:
                merged.count += count
                merged.total, merged.square = (a + np.array(b) for a, b in zip(merged._sums, sums, strict=True))
        return merged

    @property
    def mean(self) -> np.ndarray:
        """The mean row. There must be one."""
        return self.total / self.count

    def std(self, axis: int | None = None) -> np.ndarray:
        """The standard deviation over all axes, or over all axes except ``axis`` of a row. There must be a row."""
        reduced = tuple(i for i in range(np.ndim(self.total)) if i != axis)
        mean = (self.total / self.count).mean(reduced)
        return np.sqrt((self.square / self.count).mean(reduced) - mean**2)


@jax.jit
def embed(model: Model, inputs) -> Embedded:
    return model.embed(inputs)[0]


class Surveyor:
    """Collects a :class:`Survey` batch by batch."""

    def __init__(self, model: Model):
        self.model = model
        self.sequence, self.question, self.image, self.deepstack = (Moments() for _ in range(4))

    def add(self, batch: Batch, rows: int) -> None:
        """Adds the first ``rows`` rows of a batch. The others are repeats."""
        embedded = fetch(embed(self.model, batch.inputs))
        image = batch.spans["image"][:rows]
        self.sequence.add(embedded.x[:rows][np.asarray(batch.inputs.attention_mask)[:rows]])
        self.question.add(embedded.x[:rows][batch.spans["subject"][:rows]])
        self.image.add(embedded.x[:rows][image])
        if embedded.deepstack is not None:
            self.deepstack.add(np.moveaxis(embedded.deepstack[:, :rows][:, image], 0, 1))

    def survey(self) -> Survey:
        sequence, question, image, deepstack = (
            moments.joined() for moments in (self.sequence, self.question, self.image, self.deepstack)
        )
        table = self.model.text.embed_tokens.weight[...].astype(jnp.float32)
        sigma = {
            "sequence": float(sequence.std()),
            "question": float(question.std()),
            "vocabulary": float(jnp.std(table)) * self.model.config.text.embed_scale,
        }
        return Survey(
            sigma,
            deepstack_sigma=deepstack.std(0) if deepstack.count else None,
            mean_image=image.mean if image.count else None,
            mean_deepstack=deepstack.mean if deepstack.count else None,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch to corrupt."""

    model: Model
    processor: Processor
    examples: Sequence[Example]
    """One for each row."""
    counterparts: Sequence[Example]
    """The example with which each row may be swapped."""
    batch: Batch
    """The encoded examples."""
    embedded: Embedded
    """Their clean embeddings."""
    keys: Key[Array, "batch"]
    """One random key for each row."""
    survey: Survey
    scale: float
    """The noise's scale s (P0, equation 5)."""
    sigma: float
    """sigma_E."""

    def noise(self, stream: int = 0) -> Float[Array, "batch tokens width"]:
        """Independent N(0, 1) numbers; another ``stream`` gives other numbers."""
        return normal(self.keys, *self.embedded.x.shape[1:], stream)

    def again(self, **changed) -> Batch:
        """The batch with some fields of its examples replaced (field -> one value for each row), in the same shape."""
        rows = [dict(zip(changed, values, strict=True)) for values in zip(*changed.values(), strict=True)]
        examples = [dataclasses.replace(e, **row) for e, row in zip(self.examples, rows, strict=True)]
        batch = encode(examples, self.processor, self.model.config, step=self.batch.inputs.input_ids.shape[1])
        inputs = batch.inputs.take(np.arange(len(examples)), len(examples) * self.batch.images)
        return Batch(inputs, batch.spans, self.batch.images)

    def with_images(self, images: Sequence[Sequence]) -> Embedded:
        """The embeddings with other images in place of the prompts' images."""
        batch = self.again(images=images)
        if not np.array_equal(batch.inputs.input_ids, self.batch.inputs.input_ids):
            raise UserError("a corrupted image has another number of tokens: trace with images of one size")
        return embed(self.model, batch.inputs)


@jax.jit(static_argnames=("length", "width"))
def normal(
    keys: Key[Array, "batch"], length: int, width: int, stream: Int[ArrayLike, ""] | int = 0
) -> Float[Array, "batch tokens width"]:
    """N(0, 1) numbers. A token's numbers depend only on its row's key, its position and the
    stream."""

    def token(key, position):
        return jax.random.normal(jax.random.fold_in(key, position), (width,))

    def sample(key):
        return jax.vmap(token, (None, 0))(jax.random.fold_in(key, stream), jnp.arange(length))

    return jax.vmap(sample)(keys)


def sample_key(seed: int, name: str, replicate: int) -> Key[Array, ""]:
    """The key of one replicate of the sample with this id."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), replicate)


def question_noise(case: Case) -> Embedded:
    """Gaussian noise on the question's token embeddings (P0, equation 5), or on those of its subject, where the example
    names one (ROME)."""
    noise = case.scale * case.sigma * case.noise()
    x = jnp.where(case.batch.spans["subject"][..., None], case.embedded.x + noise, case.embedded.x)
    return case.embedded._replace(x=x)


def image_noise(case: Case) -> Embedded:
    """Gaussian noise on the image's embeddings and on DeepStack's tensors, scaled by each tensor's own standard
    deviation (after Palit et al. 2023, whose model has no DeepStack)."""
    image, (x, deepstack) = case.batch.spans["image"][..., None], case.embedded
    x = jnp.where(image, x + case.scale * case.sigma * case.noise(), x)
    if deepstack is not None:
        noise = jnp.stack([case.noise(layer) for layer in range(1, 1 + len(deepstack))])
        spread = case.scale * jnp.asarray(case.survey.deepstack_sigma, x.dtype)[:, None, None, None]
        deepstack = jnp.where(image, deepstack + spread * noise, deepstack)
    return Embedded(x, deepstack)


def mean_image(case: Case) -> Embedded:
    """Replaces every image token by the task's mean image token (P2), in DeepStack too."""
    image, (x, deepstack) = case.batch.spans["image"][..., None], case.embedded
    x = jnp.where(image, jnp.asarray(case.survey.mean_image, x.dtype), x)
    if deepstack is not None:
        mean = jnp.asarray(case.survey.mean_deepstack, x.dtype)[:, None, None]
        deepstack = jnp.where(image, mean, deepstack)
    return Embedded(x, deepstack)


def swapped_image(case: Case) -> Embedded:
    """Another sample's images, in the sizes of those that they replace (after NOTICE, Golovanevsky et al. 2025)."""
    pairs = zip(case.examples, case.counterparts, strict=True)
    return case.with_images(
        [[b.images[i % len(b.images)].resize(a.size) for i, a in enumerate(e.images)] for e, b in pairs]
    )


def blurred_image(case: Case) -> Embedded:
    """The images after a Gaussian blur whose radius is a sixteenth of the longer side; small text is not legible."""
    return case.with_images(
        [[i.filter(ImageFilter.GaussianBlur(_BLUR * max(i.size))) for i in e.images] for e in case.examples]
    )


def swapped_question(case: Case) -> Embedded:
    """Another sample's question tokens in place of this one's, repeated or cut to the same length (symmetric token
    replacement, after Zhang and Nanda 2024)."""
    others = encode(case.counterparts, case.processor, case.model.config)
    ids = np.array(case.batch.inputs.input_ids)
    for row, span in enumerate(case.batch.spans["question"]):
        ids[row, span] = np.resize(others.inputs.input_ids[row, others.spans["question"][row]], span.sum())
    return case.embedded._replace(x=embed(case.model, case.batch.inputs.replace(input_ids=ids)).x)


def _same_question(one: Example, other: Example) -> bool:
    return one.question == other.question


def _same_image(one: Example, other: Example) -> bool:
    """Whether both show the same image. True if ``other`` has no image, because then there is nothing to swap in."""
    if not len(other.images):
        return True
    if one.image_id is not None and other.image_id is not None:
        return one.image_id == other.image_id
    first, second = ([(i.size, i.tobytes()) for i in example.images] for example in (one, other))
    return first == second


class Corruption(NamedTuple):
    """A corruption and its properties."""

    corrupt: Callable[[Case], Embedded]
    random: bool
    """Whether replicates differ."""
    visual: bool
    """Whether it changes the image."""
    same: Callable[[Example, Example], bool] | None = None
    """For a swap: whether two examples are equal in the swapped part, so that a swap would change nothing."""


CORRUPTIONS: dict[str, Corruption] = {
    "question_noise": Corruption(question_noise, True, False),
    "swapped_question": Corruption(swapped_question, True, False, _same_question),
    "image_noise": Corruption(image_noise, True, True),
    "mean_image": Corruption(mean_image, False, True),
    "swapped_image": Corruption(swapped_image, True, True, _same_image),
    "blurred_image": Corruption(blurred_image, False, True),
}

#: The name of a corruption. Static checkers see any string, because they cannot read the table.
if TYPE_CHECKING:
    CorruptionName = str
else:
    CorruptionName = Literal[tuple(CORRUPTIONS)]


def counterpart(
    examples: Sequence[Example],
    row: int,
    replicate: int = 0,
    seed: int = 0,
    same: Callable[[Example, Example], bool] | None = None,
) -> Example:
    """The example with which an example is swapped.

    Its gold answer is wrong for this example, so that the swap can change the answer. Each replicate has another
    counterpart, as long as there are enough. The order of the examples does not matter: they are sorted by a digest of
    the seed and the two ids.

    Args:
        row: the number of the example to be swapped.
        same: whether two examples are equal in the swapped part. Such an example is no counterpart.

    Raises:
        UserError: if there is no such example.
    """
    example = examples[row]
    right_answers = {normalise(answer) for answer in example.answers}

    def digest(other: Example) -> bytes:
        return hashlib.sha256(f"{seed}\0{example.id}\0{other.id}".encode()).digest()

    others = (e for e in sorted(examples, key=digest) if normalise(e.answers[0]) not in right_answers)
    candidates = list(itertools.islice((e for e in others if same is None or not same(example, e)), replicate + 1))
    if not candidates:
        parts: dict[Any, str] = {_same_question: ", another question", _same_image: ", another image"}
        part = parts.get(same, "")
        raise UserError(
            f"example {example.id!r} has no counterpart with another answer than {example.answers[0]!r}{part}: "
            "trace more samples"
        )
    return candidates[replicate % len(candidates)]


def as_interventions(model: Model, clean: Embedded, corrupt: Embedded) -> tuple[Add, ...]:
    """Interventions that add the difference from the clean to the corrupted embeddings, and to DeepStack's tensors."""
    interventions = [Add(corrupt.x - clean.x)]
    if clean.deepstack is not None and corrupt.deepstack is not None and corrupt.deepstack is not clean.deepstack:
        depth, count = model.config.text.num_hidden_layers, len(clean.deepstack)
        slot = jnp.minimum(jnp.arange(depth), count).astype(jnp.int32)
        interventions.append(Add(corrupt.deepstack - clean.deepstack, site="text.deepstack", slot=slot))
    return tuple(interventions)


@dataclasses.dataclass(frozen=True)
class Corrupter:
    """Corrupts batches of a task's examples: ``(rows, batch) -> interventions``.

    Args:
        options: :class:`interventions.trace.options.TraceOptions`, or anything with its ``corruption, noise_scale,
            sigma, seed``.
    """

    model: Model
    processor: Processor
    examples: Sequence[Example]
    survey: Survey
    options: Any

    def __call__(self, rows: Sequence[int], batch: Batch, replicate: int = 0) -> tuple[Add, ...]:
        options, corruption = self.options, CORRUPTIONS[self.options.corruption]
        rows = [*rows, *[rows[-1]] * (len(batch.inputs.input_ids) - len(rows))]  # the batch repeats its last row
        examples = [self.examples[row] for row in rows]
        others = examples
        if corruption.same is not None:
            others = [counterpart(self.examples, row, replicate, options.seed, corruption.same) for row in rows]
        keys = jnp.stack([sample_key(options.seed, example.id, replicate) for example in examples])
        embedded = embed(self.model, batch.inputs)
        sigma = self.survey.sigma[options.sigma]
        case = Case(
            self.model, self.processor, examples, others, batch, embedded, keys, self.survey, options.noise_scale, sigma
        )
        return as_interventions(self.model, embedded, corruption.corrupt(case))


def survey(model: Model, groups: Iterable[tuple[Sequence[int], Batch]]) -> Survey:
    """The :class:`Survey` of a task, from all its batches ``(row numbers, batch)``."""
    surveyor = Surveyor(model)
    for rows, batch in groups:
        surveyor.add(batch, len(rows))
    return surveyor.survey()
