"""How adapters are trained: the options, what is trained, and the loop. The losses are in :mod:`train.trunk` and
:mod:`train.tower`."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.struct
import jax

from interventions.kinds.lora import LoRA
from interventions.placement.adapters import init_lora
from train.loop import WATCHING, LoopOptions, fit
from train.meter import About
from train.objective import Epochs, LabelOptions, linear_decay, scaled_rate
from train.step import Loss
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.errors import UserError
from vlm_jax.files import read_json
from vlm_jax.runs.processes import fetch, first
from vlm_jax.runs.ranges import BATCH, RATE, Range

#: P0's peak learning rate, which it uses for a model of width 2560.
_LR = 2e-4
#: Labels of the trained arrays, A and B of every adapter. LoRA+ (Hayou et al. 2024) trains B with a larger rate than A.
ADAPTER_LABELS = ("lora_a", "lora_b")
#: The label of DoRA's magnitudes.
_MAGNITUDE = "lora_magnitude"


@dataclasses.dataclass(frozen=True)
class LoRAOptions(LabelOptions, LoopOptions):
    """How LoRA is trained. The defaults are those of P0's appendix D.

    LoRA adds the product of two small matrices, B A, to a frozen matrix, and trains only A and B. The labels for
    --label-lr and --label-decay are lora_a and lora_b, and lora_magnitude with --use-dora.
    """

    r: Annotated[int, Range(least=1)] = 64
    """Rank of LoRA: the number of rows of A and of columns of B."""
    alpha: Annotated[float, Range(above=0)] = 16.0
    """LoRA's product B A is multiplied by alpha / r."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead, so that a larger rank does not make the product smaller (rsLoRA,
    Kalajdzievski 2023)."""
    use_dora: bool = False
    """Also train the size of each output: the columns of the frozen matrix plus B A are scaled to trained lengths
    (DoRA, Liu et al. 2024). A step takes longer, because it computes the lengths of all columns."""
    dropout: Annotated[float, Range(least=0, below=1)] = 0.05
    """Share of LoRA's inputs that are set to 0 at random during training."""
    epochs: Annotated[int, Range(least=1)] = 3
    """Number of passes over all training examples."""
    batch: Annotated[int, BATCH] = 4
    """Training examples in a micro-batch, which is what runs at once. A step has BATCH x ACCUMULATION examples."""
    accumulation: Annotated[int, Range(least=1)] = 2
    """Micro-batches in a step. They run one after the other, and their gradients are averaged."""
    lr: Annotated[float | None, RATE] = None
    """Learning rate at the first step. It falls linearly to 0. By default 2e-4 x 2560 / WIDTH, where WIDTH is the
    model's hidden size; for P0's model, of width 2560, this is P0's rate."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the initial adapter, of the order of the training examples and of dropout."""
    remat: Literal["full", "some", "none"] = "some"
    """Which activations are computed again in the backward pass instead of being stored. full: all of a layer's, which
    needs the least memory and the most time; some: all except two wide outputs of the MLP, gate and up; none: only
    those that are cheap to compute, which needs the most memory."""
    trunk_gib: Annotated[float, Range(least=0)] = 4.0
    """The layers below the lowest adapter are run once for each training example, and their outputs are stored: in
    memory if they take at most this many GiB, else in a temporary file."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the arrays that are trained."""
        return (*ADAPTER_LABELS, _MAGNITUDE) if self.use_dora else ADAPTER_LABELS

    def check_loop(self) -> None:
        super().check_loop()
        self.check_labels(self.labels)

    def begin(self, model: Model, names: Sequence[str], seed: int | None = None) -> LoRA:
        """The adapter on these modules with which a training begins."""
        return init_lora(
            model,
            names,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            key=jax.random.key(self.seed if seed is None else seed),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )


@flax.struct.dataclass
class Adapted:
    """A frozen model with the adapter that is trained.

    lowest: the first layer that a step runs; no layer below it has an adapter. remat: see :class:`LoRAOptions`.
    """

    model: Model
    lora: LoRA
    lowest: int = flax.struct.field(pytree_node=False)
    remat: str = flax.struct.field(pytree_node=False, default="some")


def adapter_label(path: str) -> str:
    """The rule for :class:`Adapted`: the adapter's A, B and magnitudes are trained, the model and slots are frozen."""
    if path.startswith("lora.weights."):
        return ADAPTER_LABELS[int(path.rpartition(".")[2])]
    return _MAGNITUDE if path.startswith("lora.magnitude.") else FREEZE


def fit_adapter(
    loss: Loss,
    params: Adapted,
    step_batch: Callable[[int], Any],
    epochs: Epochs,
    options: LoRAOptions,
    names: Sequence[str],
    name: str,
    folder: Path | None,
    ids: Sequence[str],
    **about: Any,
) -> LoRA:
    """The adapter of ``params`` after training; arguments as :func:`train_lora`.

    Args:
        step_batch: step -> its batch.
        about: fields of :class:`train.meter.About`.
    """
    if folder is not None:
        compared = [field.name for field in dataclasses.fields(LoRAOptions) if field.name not in _WITHOUT_EFFECT]
        settings = {option: getattr(options, option) for option in compared}
        check_same(folder / "training.json", {**settings, "modules": sorted(names), "examples": epochs.examples})

    def ids_of(step: int) -> list[str]:
        rows: list[int] = epochs.rows(step).ravel().tolist()
        return [ids[row] for row in rows] if ids else list(map(str, rows))

    lr = options.lr if options.lr is not None else scaled_rate(_LR, params.model.config.text.hidden_size)
    transforms, rates = options.optimisers(options.labels, lr, functools.partial(linear_decay, steps=epochs.steps))
    trained = fit(
        loss,
        params,
        step_batch,
        transforms,
        adapter_label,
        steps=epochs.steps,
        rows=options.batch,
        seed=options.seed,
        name=name,
        folder=folder,
        options=options,
        about=About(rate=rates, ids=ids_of, **about),
    )
    weights, magnitude = fetch((trained.params.lora.weights, trained.params.lora.magnitude))
    return params.lora.replace(weights=weights, magnitude=magnitude)


#: Options that change how a training runs, but not its result. They may differ when it continues.
_WITHOUT_EFFECT = ("remat", "trunk_gib", *WATCHING)


def check_same(file: Path, settings: dict) -> None:
    """Writes the settings of a training to a file. If the file exists, checks that it holds the same settings.

    Raises:
        UserError: if the file holds other settings.
    """
    first(lambda: _check_same(file, settings))


def _check_same(file: Path, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        kept = read_json(file)
        differ = sorted(k for k in settings.keys() | kept.keys() if settings.get(k) != kept.get(k))
        if differ:
            shown = ", ".join(f"{k} {kept.get(k)!r} there, {settings.get(k)!r} here" for k in differ)
            raise UserError(f"{file.parent} holds another training ({shown}): choose another folder or delete it")
    else:
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps(settings, indent=2) + "\n")
        scratch.replace(file)
