"""What the oracle must know of a family: its tiny model, and how its prompts and its vision tower differ."""

from collections.abc import Callable
from dataclasses import dataclass

import transformers

VOCAB, PAD, TEXT_TOKENS = 320, 0, range(1, 300)
VISION_START, VISION_END, IMAGE, VIDEO = 300, 301, 302, 303
PATCH, MERGE, CHANNELS, FRAMES = 4, 2, 3, 2

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 3e-3,  # large enough that a hard-coded 1e-6 would show
}


@dataclass(frozen=True)
class Family:
    """The tiny model of one ``model_type``, and its differences from the others."""

    #: transformers' classes are called ``{name}Config`` and ``{name}{head}``.
    name: str
    #: Fields of the config of the text model, of the vision tower, and of the model around both.
    text: dict
    vision: dict | None = None
    top: dict | None = None
    head: str = "ForConditionalGeneration"

    #: Reads the vision tower's sites: a class of ``towers.py``.
    tower: type | None = None
    #: How many of the tower's layers the model runs, given its config; all where None.
    tower_depth: Callable | None = None
    #: How many tokens stand for an image of ``h`` by ``w`` patches: ``visual_tokens(config, h, w)``.
    visual_tokens: Callable | None = None
    #: Images have one size and enter as pixels; else they have any size and enter as patches with their grids.
    one_size: bool = False
    #: Prompts mark where an image begins and ends.
    image_marks: bool = True
    #: The processor's array that marks visual tokens.
    token_types: str | None = None
    #: The model counts positions by itself, padding left out; else ``generate`` hands them over.
    counts_positions: bool = False
    #: Visual features are added between the decoder's layers.
    deepstack: bool = False
    #: Norms multiply by this plus their weight.
    norm_offset: float = 0.0
    #: What embeddings are multiplied by, given the config.
    embedding_scale: Callable = lambda config: 1.0
    #: Changes the new model where the config asks for something that transformers does not know.
    adjust: Callable = lambda model: None

    @property
    def config(self):
        return getattr(transformers, f"{self.name}Config")

    @property
    def model(self):
        return getattr(transformers, f"{self.name.removesuffix('Text')}{self.head}")
