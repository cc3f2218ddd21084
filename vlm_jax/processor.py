"""What the library uses of a Hugging Face processor and of its parts."""

import os
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A Hugging Face tokenizer."""

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        """The token ids of texts and, if asked for, the characters that each token covers."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """The text of token ids."""
        ...

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The texts of several rows of token ids."""
        ...

    # What follows comes from the tokenizer's files: such as chat_template, eos_token, model_max_length.
    def __getattr__(self, name: str) -> Any: ...


@runtime_checkable
class Processor(Protocol):
    """Tokenizer, image processor and chat template of a model.

    image_processor: with the PIL backend; None for a text-only model (:class:`vlm_jax.families.base.TextProcessor`).
    """

    tokenizer: Tokenizer
    image_processor: Any
    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool = False) -> Any:
        """The text of a conversation: messages with a "role", and a "content" that is a list of parts, which are
        ``{"type": "image"}`` or ``{"type": "text", "text": ...}``."""
        ...

    def save_pretrained(self, save_directory: str | os.PathLike) -> Any:
        """Writes the files of all parts to a folder."""
        ...
