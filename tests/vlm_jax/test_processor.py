"""Processors of transformers and of text-only models are what the library expects of a processor."""

import vlm_jax
from vlm_jax.families.base import TextProcessor, load_tokenizer
from vlm_jax.processor import Processor, Tokenizer


def test_processors_follow_the_protocol():
    _, processor = vlm_jax.load("mini-qwen3-vl")
    text = TextProcessor(processor.tokenizer)
    for one in (processor, text):
        assert isinstance(one, Processor) and isinstance(one.tokenizer, Tokenizer)
    assert not isinstance(processor.tokenizer, Processor)  # the control


def test_a_text_only_models_processor_is_saved_and_loaded(tmp_path):
    _, processor = vlm_jax.load("mini-qwen3-vl")
    text = TextProcessor(processor.tokenizer)
    text.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    question = [{"role": "user", "content": [{"type": "text", "text": "What colour is it?"}]}]
    prompts = [one.apply_chat_template(question, add_generation_prompt=True) for one in (text, loaded)]
    assert prompts[0] == prompts[1] and "What colour is it?" in prompts[0]
    assert loaded.tokenizer(prompts[0])["input_ids"] == text.tokenizer(prompts[0])["input_ids"]
