"""Ragged batches of random prompts and images, as a processor would return them."""

import numpy as np
import torch

from hf_oracle.family import CHANNELS, FRAMES, IMAGE, PAD, PATCH, TEXT_TOKENS, VISION_END, VISION_START
from hf_oracle.models import family_of, tiny_config


def make_batch(rows, side="left", seed=0, config=None):
    """The arrays a processor would return for ``rows``: an int is that many text tokens, (h, w) an image's patch grid.

    A row's content depends on ``seed`` and its place alone, so both padding sides hold the same prompts.
    """
    config = config or tiny_config()
    family = family_of(config)
    rng = np.random.default_rng(seed)
    prompts, images, grids = [], [], []
    for row in rows:
        tokens = []
        for part in row:
            if isinstance(part, int):
                tokens += rng.choice(TEXT_TOKENS, part).tolist()
                continue
            h, w = part
            placeholders = [IMAGE] * family.visual_tokens(config, h, w)
            tokens += [VISION_START, *placeholders, VISION_END] if family.image_marks else placeholders
            grids.append((1, h, w))
            fixed = (1, CHANNELS, h * PATCH, w * PATCH)
            shape = fixed if family.one_size else (h * w, CHANNELS * FRAMES * PATCH**2)
            images.append(rng.standard_normal(shape, np.float32))
        prompts.append(tokens)

    length = max(map(len, prompts))
    ids = np.full((len(rows), length), PAD, np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if not images:
        return batch
    batch["pixel_values"] = np.concatenate(images)
    types = (ids == IMAGE).astype(np.int64)
    if family.token_types:
        batch[family.token_types] = types
    if not family.one_size:
        batch["image_grid_thw"] = np.array(grids, np.int64)
    return batch


def tensors(batch):
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def positions(config, batch):
    """Positions that skip padding, as ``generate`` gives them; without them rows would be rotated by their padding."""
    if family_of(config).counts_positions:
        return {}
    return {"position_ids": torch.from_numpy((batch["attention_mask"].cumsum(-1) - 1).clip(0))}


def part_masks(config, rows, side="left"):
    """For the rows of :func:`make_batch`, whose last two parts are the question and the answer: which tokens are
    visual, end an image, come behind a row's first image, or are the question's or the answer's, ``(B, T)`` bool."""
    names = ("image", "image_end", "behind", "question", "answer")
    family = family_of(config)
    marks = 1 if family.image_marks else 0
    prompts = []
    for row in rows:
        tokens, seen = [], False
        for number, part in enumerate(row):
            if isinstance(part, int):
                groups = {"question": number == len(row) - 2, "answer": number == len(row) - 1, "behind": seen}
                tokens += [groups] * part
            else:
                start = [{"behind": seen}] * marks
                visual = [{"image": True}] * family.visual_tokens(config, *part)
                tokens, seen = [*tokens, *start, *visual, *[{"image_end": True}] * marks], True
        prompts.append(tokens)
    length = max(map(len, prompts))
    masks = {name: np.zeros((len(rows), length), bool) for name in names}
    for i, tokens in enumerate(prompts):
        at = length - len(tokens) if side == "left" else 0
        for name in names:
            masks[name][i, at : at + len(tokens)] = [token.get(name, False) for token in tokens]
    return masks
