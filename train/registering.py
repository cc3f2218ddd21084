"""How a model is tuned to read pictures through registers (P1, section 4)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax

from interventions.modules import module_names
from interventions.placement.adapters import adapter_parameters, init_lora_on, merge
from train import tune
from train.editors import TrainingOptions, train_editors
from train.loop import LoopOptions
from train.objective import scaled_rate
from train.subsets import check_trainable
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.processor import Processor
from vlm_jax.registers import Mask, Positions, Registers
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, RATE, Range
from vlm_jax.sites import TEXT_LINEARS

#: What is trained -> the default peak learning rate for a model of width 2560.
_LR = {"decoder": 2e-5, "lora": 2e-4, "registers": 2e-3}

#: LoRA's rank and alpha.
_RANK, _ALPHA = 64, 16.0


class Preset(NamedTuple):
    """The values of the options that are not given. lr: None stands for :data:`_LR`."""

    epochs: int
    batch: int
    seed: int
    lr: float | None = None
    pixels: tuple[int | None, int | None] = (None, None)


#: "paper" is P1, table 3. Its text does not give the warm-up and the weight decay; here they are those of train.tune.
PRESETS = {"default": Preset(3, 16, 0), "paper": Preset(10, 32, 42, 2e-7, (784, 50_176))}


@dataclasses.dataclass(frozen=True)
class RegisterOptions(LoopOptions, ModelOptions):
    """Which registers a model gets, and how it is trained with them."""

    registers: Annotated[int, Range(least=1)] = 16
    """Number of registers behind every image. Where a model closes an image with a token, this is the first of them."""
    mask: Mask = "register"
    """Who sees whom, besides the causal order. register: text does not see images (P1); mitre: as register, and images
    do not see registers, and the registers of an image see each other in both directions; gist: as register, and text
    does not see the text before the first registers; none, blind: controls in which text sees everything, or neither
    images nor registers."""
    position_ids: Positions = "text"
    """Positions of the registers. text: one after the other, like text; first: all at the position of the first."""
    token: str | None = None
    """The token that is repeated, in a model without a token that closes an image (LLaVA). By default the one that ends
    a text."""
    trainable: Literal["decoder", "lora", "registers"] = "decoder"
    """What is trained. decoder: the text decoder with its embeddings; lora: LoRA in all its linears, which is then
    added to them; registers: only embeddings of the registers' own."""
    own_embeddings: bool = False
    """With --trainable decoder: the registers have embeddings of their own, instead of the token's."""
    r: Annotated[int | None, Range(least=1)] = None
    """With --trainable lora: the rank, 64 by default."""
    alpha: Annotated[float | None, Range(above=0)] = None
    """With --trainable lora: its output is scaled by ALPHA / R; 16 by default."""
    preset: Literal["default", "paper"] = "default"
    """The values of the options below that are not given. default: 3 epochs, batch 16, seed 0; paper: 10 epochs, batch
    32, learning rate 2e-7, seed 42, and images of 784 to 50176 pixels where the model takes images of any size."""
    epochs: Annotated[int | None, Range(least=1)] = None
    """Number of passes over all training examples."""
    batch: Annotated[int | None, BATCH] = None
    """Training examples in a step."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of AdamW, after a rise from 0. By default for a model of width WIDTH and --trainable decoder
    2e-5 x 2560 / WIDTH, ten times as much for lora, and a hundred times for registers. The rate then falls to 0,
    along a cosine, with lora linearly."""
    warmup: Annotated[float | None, Range(least=0, below=1)] = None
    """Share of the steps in which the learning rate rises. By default one in 30, with lora 0.03."""
    decay: Annotated[float | None, Range(least=0, most=100)] = None
    """Weight decay of AdamW, by default 0. Not with --trainable lora."""
    betas: Annotated[tuple[float, float] | None, Range(least=0, below=1)] = None
    """How much AdamW's means of the gradients and of their squares keep from one step to the next, by default 0.9 and
    0.999. Not with --trainable lora."""
    seed: Annotated[int | None, Range(least=0)] = None
    """Seed of the order of the training examples, and of LoRA's initial arrays."""

    def value(self, name: str) -> Any:
        """An option's value: the given one, or the preset's."""
        given = getattr(self, name)
        return getattr(PRESETS[self.preset], name) if given is None else given

    def load(self) -> tuple[Model, Processor]:
        """The model with its registers, not yet trained, and its processor."""
        model, processor = super().load()
        check_without_registers(model)
        if self.trainable != "registers":
            check_trainable(model)
        vision, (low, high) = model.config.vision, PRESETS[self.preset].pixels
        if vision is not None and vision.any_size and low is not None:
            vision.limit_pixels(processor.image_processor, self.min_pixels or low, self.max_pixels or high)
        return model.with_registers(self.registers_of(model, processor)), processor

    def registers_of(self, model: Model, processor: Processor) -> Registers:
        """The registers that the options describe.

        Raises:
            UserError: for a count below 1, a token that the tokeniser lacks, or options that exclude each other.
        """
        if self.own_embeddings and self.trainable != "decoder":
            raise UserError(f"--own-embeddings belongs to --trainable decoder, here it is {self.trainable}: drop one")
        if self.trainable != "lora" and (self.r is not None or self.alpha is not None):
            raise UserError(f"--r and --alpha belong to --trainable lora, here it is {self.trainable}: drop them")
        if self.trainable == "lora" and (self.decay is not None or self.betas is not None):
            raise UserError("--decay and --betas do not belong to --trainable lora: drop them")
        tokenizer = processor.tokenizer
        end = FAMILIES[model.config.family].chat.image_end
        if self.token is not None and end is not None:
            raise UserError(f"this model closes images with {end}, which becomes the register: drop --token")
        token = self.token or end or tokenizer.eos_token
        number = tokenizer.convert_tokens_to_ids(token)
        if number is None or tokenizer.convert_ids_to_tokens(number) != token:
            raise UserError(f"--token is {token!r}, which is no token of this model: name one, with its brackets")
        own = self.own_embeddings or self.trainable == "registers"
        return Registers(self.registers, number, self.mask, self.position_ids, own)


def check_without_registers(model: Model) -> None:
    """Refuses a model that has registers already."""
    if model.config.text.registers is not None:
        raise UserError("the model has registers already: name the one from which it was made")


def train_registers(
    model: Model, processor: Processor, examples: list[Example], options: RegisterOptions, folder: Path | None = None
) -> Model:
    """The model with registers after training, its vision tower and projector unchanged.

    Args:
        model: with its registers (:meth:`RegisterOptions.load`).
        folder: the folder for the log and the checkpoints; None writes nothing.
    """
    lr = options.value("lr")
    lr = scaled_rate(_LR[options.trainable], model.config.text.hidden_size) if lr is None else lr
    epochs, batch, seed = (options.value(name) for name in ("epochs", "batch", "seed"))
    given = {name: getattr(options, name) for name in ("warmup", "decay", "betas")}
    given = {name: value for name, value in given.items() if value is not None}
    loop = {field.name: getattr(options, field.name) for field in dataclasses.fields(LoopOptions)}
    if options.trainable == "lora":
        sites = [f"text.{name}" for names in TEXT_LINEARS.values() for name in names]
        r, alpha = options.r or _RANK, options.alpha or _ALPHA
        lora = init_lora_on(model, sites, r=r, alpha=alpha, key=jax.random.key(seed))
        training = TrainingOptions(epochs=epochs, batch=batch, lr=lr, **given, **loop)
        how = {"seed": seed, "name": "register", "folder": folder}
        return merge(model, train_editors(model, processor, {"lora": lora}, examples, training, **how)["lora"])
    part = "text" if options.trainable == "decoder" else "registers"
    training = tune.Args(parts=(part,), epochs=epochs, batch=batch, lr=lr, seed=seed, **given, **loop)
    return tune.tune(model, processor, examples, training, folder)


def trained_parameters(model: Model, options: RegisterOptions) -> int:
    """How many numbers are trained."""
    match options.trainable:
        case "decoder":
            return sum(leaf.size for leaf in jax.tree.leaves(model.text))
        case "registers":
            return options.registers * model.config.text.hidden_size
        case "lora":
            return adapter_parameters(model, module_names(model.depths["text"]), options.r or _RANK)
