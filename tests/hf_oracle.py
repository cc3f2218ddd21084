"""transformers' Qwen3-VL as an oracle: tiny random models, ragged batches, and every site by forward hooks.

Nothing here knows how vlm_jax computes; only the names and shapes of its taps are shared with it.
"""

import math
from collections import defaultdict

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

VOCAB, PAD, TEXT_TOKENS = 320, 0, range(1, 300)
VISION_START, VISION_END, IMAGE, VIDEO = 300, 301, 302, 303
PATCH, MERGE, CHANNELS, FRAMES = 4, 2, 3, 2

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / heads, as in the 4B release
    "max_position_embeddings": 2048,
    "rms_norm_eps": 3e-3,  # large enough that a hard-coded 1e-6 would show
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 20_000.0,
        "mrope_section": [6, 5, 5],  # the released 24:20:20, scaled to this head
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 6,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": 64,
    "num_position_embeddings": 7**2,
    "deepstack_visual_indexes": [1, 2, 4],  # uneven, so that neither a constant stride nor an offset fits
}


def tiny_config(tied=False, text=None, vision=None):
    """The tiny config, with ``text`` and ``vision`` overriding some of its fields."""
    return Qwen3VLConfig(
        text_config=TEXT | {"tie_word_embeddings": tied} | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )


def tiny_model(config, seed=0):
    """A float32 model whose every parameter is random, at a scale where each of them matters."""
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = scale(name, parameter.shape)
            parameter.normal_(mean, std, generator=generator)
    return model.eval()


# The linears that write to a residual stream. Loud ones would have each layer amplify the last one's rounding, until
# two correct float32 programs differ by more than the tolerance.
WRITERS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")


def scale(name, shape):
    """(mean, std) of a parameter: activations of order one, attention and gates away from their linear regime."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if "q_norm" in name:  # twice the score, or attention over a short row is nearly uniform
        return 2.0, 0.4
    if len(shape) == 1:  # norm weights
        return 1.0, 0.2
    if "embed" in name and "patch" not in name:
        return 0.0, 0.3
    gain = 0.5 if name.endswith(WRITERS) else 1.5
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def make_batch(rows, side="left", seed=0):
    """The arrays a processor would return for ``rows``: an int is that many text tokens, (h, w) an image's patch grid.

    A row's content depends on ``seed`` and its place alone, so both padding sides hold the same prompts.
    """
    rng = np.random.default_rng(seed)
    prompts, patches, grids = [], [], []
    for row in rows:
        tokens = []
        for part in row:
            if isinstance(part, int):
                tokens += rng.choice(TEXT_TOKENS, part).tolist()
                continue
            h, w = part
            tokens += [VISION_START, *[IMAGE] * (h * w // MERGE**2), VISION_END]
            grids.append((1, h, w))
            patches.append(rng.standard_normal((h * w, CHANNELS * FRAMES * PATCH**2), np.float32))
        prompts.append(tokens)

    length = max(map(len, prompts))
    ids = np.full((len(rows), length), PAD, np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if grids:
        batch |= {
            "pixel_values": np.concatenate(patches),
            "image_grid_thw": np.array(grids, np.int64),
            "mm_token_type_ids": (ids == IMAGE).astype(np.int64),
        }
    return batch


def tensors(batch):
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class Recorder:
    """Keeps what modules take and give, in call order, under the names given to them."""

    def __init__(self):
        self.seen = defaultdict(list)
        self.handles = []

    def input(self, name, module):
        def hook(_, args, kwargs):
            self.seen[name].append(args[0] if args else kwargs["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def output(self, name, module, item=0):
        def hook(_, __, out):
            self.seen[name].append(out[item] if isinstance(out, tuple) else out)

        self.handles.append(module.register_forward_hook(hook))

    def one(self, name):
        (tensor,) = self.seen[name]
        return tensor

    def stack(self, name):
        return torch.stack(self.seen[name])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def oracle_sites(model, batch):
    """``{site: array}`` in vlm_jax's layout, NaN where nothing is promised (padded tokens, patches past an image)."""
    text, visual = model.model.language_model, model.model.visual
    with Recorder() as recorder, torch.no_grad():
        for layer in text.layers:
            recorder.input("resid_pre", layer)
            recorder.output("layer", layer)
            for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
                recorder.output(f"self_attn.{linear}", getattr(layer.self_attn, linear))
            recorder.input("head_out", layer.self_attn.o_proj)
            recorder.output("attn_out", layer.self_attn)
            recorder.output("attn_probs", layer.self_attn, item=1)
            for linear in ("gate_proj", "up_proj", "down_proj"):
                recorder.output(f"mlp.{linear}", getattr(layer.mlp, linear))
            recorder.output("mlp_out", layer.mlp)
        recorder.input("last", text.norm)
        recorder.output("norm", text.norm)

        recorder.input("visual.embeddings", visual.blocks[0])
        for block in visual.blocks:
            recorder.output("visual.attn_out", block.attn)
            recorder.output("visual.mlp_out", block.mlp)
            recorder.output("visual.resid_post", block)
        recorder.output("projector.merger", visual.merger)
        for merger in visual.deepstack_merger_list:
            recorder.output("projector.deepstack_merger_list", merger)

        logits = model(**tensors(batch), use_cache=False).logits
    assert logits.isfinite().all()  # below, NaN means "not promised", and must come from nowhere else

    # DeepStack is added between the layers, so what a layer hands on is what the next one takes.
    resid_post = torch.stack([*recorder.seen["resid_pre"][1:], recorder.one("last")])
    tokens = {
        "text.embeddings": recorder.seen["resid_pre"][0],
        "text.resid_pre": recorder.stack("resid_pre"),
        "text.head_out": recorder.stack("head_out"),
        "text.attn_out": recorder.stack("attn_out"),
        "text.mlp_out": recorder.stack("mlp_out"),
        "text.deepstack": resid_post - recorder.stack("layer"),
        "text.resid_post": resid_post,
        "text.norm": recorder.one("norm"),
        "logits": logits,
    }
    for name in recorder.seen:
        if name.startswith(("self_attn.", "mlp.")):
            tokens[f"text.{name}"] = recorder.stack(name)

    padding = torch.from_numpy(batch["attention_mask"] == 0)
    sites = {name: blank(x, padding[..., None]) for name, x in tokens.items()}
    sites["text.head_out"] = sites["text.head_out"].unflatten(-1, (-1, model.config.text_config.head_dim))
    sites["text.attn_probs"] = blank(recorder.stack("attn_probs"), padding[:, None, :, None])

    if "pixel_values" in batch:
        patches = batch["image_grid_thw"].prod(-1).tolist()
        merged = [n // MERGE**2 for n in patches]
        sites["visual.embeddings"] = per_image(recorder.one("visual.embeddings"), patches)
        for name in ("visual.attn_out", "visual.mlp_out", "visual.resid_post"):
            sites[name] = per_image(recorder.stack(name), patches)
        sites["projector.merger"] = per_image(recorder.one("projector.merger"), merged)
        name = "projector.deepstack_merger_list"
        sites[name] = per_image(recorder.stack(name), merged)
    return {name: site.numpy() for name, site in sites.items()}


def blank(x, where):
    return x.masked_fill(where, torch.nan)


def per_image(x, counts):
    """(..., N, D) over all images' patches -> (..., I, max count, D), NaN past each image's own."""
    images = [part.movedim(-2, 0) for part in x.split(counts, dim=-2)]
    padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=torch.nan)
    return padded.movedim((0, 1), (-3, -2))
