"""transformers as an oracle: tiny random models of every family, ragged batches, and every site by forward hooks.

Nothing here knows how vlm_jax computes; only the names and shapes of its taps are shared with it.
"""

import math
import sys
from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.vision_utils import get_vision_window_index

VOCAB, PAD, TEXT_TOKENS = 320, 0, range(1, 300)
VISION_START, VISION_END, IMAGE, VIDEO = 300, 301, 302, 303
PATCH, MERGE, CHANNELS, FRAMES = 4, 2, 3, 2


class Family(NamedTuple):
    """The tiny model of one ``model_type``: transformers' classes by name, and the fields of its config."""

    name: str
    text: dict
    vision: dict | None = None
    top: dict | None = None
    head: str = "ForConditionalGeneration"

    @property
    def config(self):
        return getattr(transformers, f"{self.name}Config")

    @property
    def model(self):
        return getattr(transformers, f"{self.name.removesuffix('Text')}{self.head}")


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
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN3_TEXT = COMMON | {
    "head_dim": 32,  # not hidden_size / heads, as in the 4B release
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
}
QWEN3_VL = Family(
    "Qwen3VL",
    QWEN3_TEXT
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 20_000.0,
            "mrope_section": [6, 5, 5],  # the released 24:20:20, scaled to this head
            "mrope_interleaved": True,
        },
    },
    {
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
    },
    QWEN_IDS,
)
QWEN2_5_VL = Family(
    "Qwen2_5_VL",
    COMMON
    | {
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "mrope_section": [2, 3, 3]},
    },
    {
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": 4 * PATCH,  # two merged patches to a side
        "fullatt_block_indexes": [1, 4],
        "out_hidden_size": 64,
    },
    QWEN_IDS,
)
GEMMA3_TEXT = COMMON | {
    "num_hidden_layers": 7,  # by the family's default pattern, all but the sixth are local
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 9,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3_000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA3 = Family(
    "Gemma3",
    {"model_type": "gemma3_text"} | GEMMA3_TEXT,
    {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "image_size": 8 * PATCH,
        "patch_size": PATCH,
        "layer_norm_eps": 2e-3,
        "vision_use_head": False,
    },
    {
        "mm_tokens_per_image": 16,  # more than the sliding window
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
)
LLAMA_TEXT = COMMON | {
    "num_hidden_layers": 4,
    "head_dim": 24,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
LLAVA = Family(
    "Llava",
    COMMON
    | {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000.0},
    },
    {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "image_size": 6 * PATCH,
        "patch_size": PATCH,
        "layer_norm_eps": 2e-3,
    },
    {"image_token_index": IMAGE, "image_seq_length": 36},
)
FAMILIES = {
    "qwen3_vl": QWEN3_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "gemma3": GEMMA3,
    "llava": LLAVA,
    "qwen3": Family("Qwen3", QWEN3_TEXT | {"num_hidden_layers": 4}, head="ForCausalLM"),
    "qwen2": Family(
        "Qwen2",
        COMMON | {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
        head="ForCausalLM",
    ),
    "gemma3_text": Family("Gemma3Text", GEMMA3_TEXT, head="ForCausalLM"),
    "llama": Family("Llama", LLAMA_TEXT, head="ForCausalLM"),
}


def tiny_config(family="qwen3_vl", tied=False, text=None, vision=None, top=None):
    """The family's tiny config, with ``text``, ``vision`` and ``top`` overriding some of its fields."""
    family = FAMILIES[family]
    text = family.text | {"tie_word_embeddings": tied} | (text or {})
    if family.vision is None:
        return family.config(**text)
    return family.config(
        text_config=text,
        vision_config=family.vision | (vision or {}),
        tie_word_embeddings=tied,
        **family.top | (top or {}),
    )


class _Float64(TorchFunctionMode):
    """Reads every float32 that PyTorch code asks for as float64, except in rotary modules.

    A model whose weights are float64 is not a float64 program yet: transformers computes norms, softmax and
    interpolation weights in float32 by name. Rotary angles stay float32, because their rounding belongs to the model:
    an angle of 500 radians is a multiple of 3e-5, in training as in vlm_jax. Their powers, sines and
    cosines are computed in float64, since CPUs round these differently.
    """

    in_rotary_module = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.in_rotary_module:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = [torch.float64 if arg is torch.float32 else arg for arg in args]
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        elif function is torch.Tensor.__rpow__:
            exponent, base = args
            return function(exponent.double(), base).float()
        elif function in (torch.Tensor.cos, torch.Tensor.sin):
            return function(args[0].double())
        return function(*args, **kwargs)


@contextmanager
def computing_in(dtype):
    """PyTorch code that says float32, or says nothing, computes in float64 if that is ``dtype``."""
    if dtype != torch.float64:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def enter_rotary(*_):
    _Float64.in_rotary_module = True


def leave_rotary(*_):
    _Float64.in_rotary_module = False


def exact_model(config, seed=0):
    """The float64 twin of :func:`tiny_model`: equal parameters, the same function without float32's rounding.

    float32 results depend on the CPU, because its vector width decides the order of sums. The twin's do not, to
    float32's last bit. It has to run under ``computing_in(torch.float64)``, as it does in :func:`oracle_sites`.
    """
    with computing_in(torch.float64):
        enter_rotary()  # the constructor computes the frequencies
        model = tiny_model(config, seed, torch.float64)
        leave_rotary()
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_pre_hook(enter_rotary)
            module.register_forward_hook(leave_rotary, always_call=True)
    return model


def tiny_model(config, seed=0, dtype=torch.float32):
    """A model whose every parameter is a random float32 number, at a scale where each of them matters."""
    cls = FAMILIES[config.model_type].model
    model = cls._from_config(config, attn_implementation="eager", dtype=dtype)
    if getattr(config, "mm_projector_type", None) == "linear":  # which transformers does not know
        model.model.multi_modal_projector.act = model.model.multi_modal_projector.linear_2 = torch.nn.Identity()
    generator = torch.Generator().manual_seed(seed)
    offset_norms = {
        f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Gemma3RMSNorm"
    }
    embed_scale = math.sqrt(config.get_text_config().hidden_size) if "gemma3" in config.model_type else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = scale(name, parameter.shape)
            mean -= name in offset_norms
            std /= embed_scale if "embed_tokens" in name else 1
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(mean, std, generator=generator))
    return model.eval()


# The linears that write to a residual stream. Loud ones would have each layer amplify the last one's rounding, until
# two correct float32 programs differ by more than the tolerance.
WRITERS = tuple(f"{name}.weight" for name in ("o_proj", "out_proj", "down_proj", "attn.proj", "mlp.linear_fc2", "fc2"))


def scale(name, shape):
    """(mean, std) of a parameter: activations of order one, attention and gates away from their linear regime."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if "q_norm" in name:  # twice the score, or attention over a short row is nearly uniform
        return 2.0, 0.4
    if "class_embedding" in name:
        return 0.0, 0.3
    if len(shape) == 1:  # norm weights
        return 1.0, 0.2
    if "mm_input_projection" in name:  # a parameter that is multiplied from the right
        return 0.0, 1.5 / math.sqrt(shape[0])
    if "embed" in name and "patch" not in name:
        return 0.0, 0.3
    gain = 0.5 if name.endswith(WRITERS) else 1.5
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def make_batch(rows, side="left", seed=0, config=None):
    """The arrays a processor would return for ``rows``: an int is that many text tokens, (h, w) an image's patch grid.

    A row's content depends on ``seed`` and its place alone, so both padding sides hold the same prompts.
    """
    config = config or tiny_config()
    rng = np.random.default_rng(seed)
    prompts, images, grids = [], [], []
    for row in rows:
        tokens = []
        for part in row:
            if isinstance(part, int):
                tokens += rng.choice(TEXT_TOKENS, part).tolist()
                continue
            h, w = part
            placeholders = [IMAGE] * visual_tokens(config, h, w)
            # LLaVA's prompts may have images side by side; the others' always mark their ends.
            tokens += placeholders if config.model_type == "llava" else [VISION_START, *placeholders, VISION_END]
            grids.append((1, h, w))
            fixed = (1, CHANNELS, h * PATCH, w * PATCH)
            shape = fixed if one_size(config) else (h * w, CHANNELS * FRAMES * PATCH**2)
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
    if config.model_type == "gemma3":
        batch["token_type_ids"] = types
    elif not one_size(config):
        batch |= {"image_grid_thw": np.array(grids, np.int64), "mm_token_type_ids": types}
    return batch


def one_size(config):
    """Whether the tower takes images of one size only, and as pixels rather than as patches."""
    return config.model_type in ("gemma3", "llava")


def visual_tokens(config, h, w):
    """How many tokens stand for an image of ``h`` by ``w`` patches."""
    if config.model_type == "gemma3":
        return config.mm_tokens_per_image
    if config.model_type == "llava":
        return h * w + (config.vision_feature_select_strategy == "full")
    return h * w // MERGE**2


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
            self.seen[name].append(out if isinstance(out, torch.Tensor) else out[item])

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


@contextmanager
def attention_recorded(modules):
    """Yields a list per attention module, of ``(scores, probs)`` of its every call; masked scores are NaN."""
    calls = defaultdict(list)
    files = {sys.modules[type(module).__module__] for module in modules}
    eager = {file: file.eager_attention_forward for file in files}

    def record(file):
        def forward(module, query, key, value, attention_mask, *args, **kwargs):
            out, probs = eager[file](module, query, key, value, attention_mask, *args, **kwargs)
            scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * kwargs["scaling"]
            calls[module].append((scores.masked_fill(probs == 0, torch.nan), probs))
            return out, probs

        return forward

    for file in files:
        file.eager_attention_forward = record(file)
    try:
        yield calls
    finally:
        for file in files:
            file.eager_attention_forward = eager[file]


def oracle_sites(model, batch):
    """``{site: float32 array}`` in vlm_jax's layout, NaN where nothing is promised (padded tokens, patches past an
    image). A float64 model computes all of it in float64, and each number is rounded once, at the end."""
    text = getattr(model.model, "language_model", model.model)
    tower = TOWERS[model.config.model_type](model, batch) if "pixel_values" in batch else None
    attentions = [layer.self_attn for layer in text.layers] + (tower.attentions if tower else [])
    inputs = tensors(batch) | positions(model.config, batch)
    if model.dtype == torch.float64 and "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    with Recorder() as recorder, attention_recorded(attentions) as calls, torch.no_grad(), computing_in(model.dtype):
        for layer in text.layers:
            sandwich = hasattr(layer, "pre_feedforward_layernorm")
            recorder.input("resid_pre", layer)
            recorder.output("layer", layer)
            for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
                recorder.output(f"self_attn.{linear}", getattr(layer.self_attn, linear))
            recorder.input("head_out", layer.self_attn.o_proj)
            recorder.output("attn_out", layer.post_attention_layernorm if sandwich else layer.self_attn)
            recorder.input("resid_mid", layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm)
            for linear in ("gate_proj", "up_proj", "down_proj"):
                recorder.output(f"mlp.{linear}", getattr(layer.mlp, linear))
            recorder.output("mlp_out", layer.post_feedforward_layernorm if sandwich else layer.mlp)
        recorder.input("last", text.norm)
        recorder.output("norm", text.norm)
        if tower:
            tower.record(recorder)
        logits = model(**inputs, use_cache=False).logits
    assert logits.isfinite().all()  # below, NaN means "not promised", and must come from nowhere else

    # DeepStack is added between the layers, so what a layer hands on is what the next one takes.
    resid_post = torch.stack([*recorder.seen["resid_pre"][1:], recorder.one("last")])
    tokens = {
        "text.embeddings": recorder.seen["resid_pre"][0],
        "text.resid_post": resid_post,
        "text.norm": recorder.one("norm"),
        "logits": logits,
    }
    if model.config.model_type == "qwen3_vl":
        tokens["text.deepstack"] = resid_post - recorder.stack("layer")
    names = ("resid_pre", "head_out", "attn_out", "resid_mid", "mlp_out")
    for name in (*names, *(name for name in recorder.seen if name.startswith(("self_attn.", "mlp.")))):
        tokens[f"text.{name}"] = recorder.stack(name)

    padding = torch.from_numpy(batch["attention_mask"] == 0)
    sites = {name: blank(x, padding[..., None]) for name, x in tokens.items()}
    sites["text.head_out"] = sites["text.head_out"].unflatten(-1, (-1, text.layers[0].self_attn.head_dim))
    for item, name in enumerate(("text.attn_scores", "text.attn_probs")):
        maps = torch.stack([calls[layer.self_attn][0][item] for layer in text.layers])
        sites[name] = blank(maps, padding[:, None, :, None])
    if tower:
        sites |= tower.sites(recorder, calls)
    return {name: site.float().numpy() for name, site in sites.items()}


def positions(config, batch):
    """Positions that skip padding, as ``generate`` gives them; without them rows would be rotated by their padding."""
    if "qwen" in config.model_type and "vl" in config.model_type:  # these find their own
        return {}
    return {"position_ids": torch.from_numpy((batch["attention_mask"].cumsum(-1) - 1).clip(0))}


def blank(x, where):
    return x.masked_fill(where, torch.nan)


class QwenTower:
    """The patches of all images in one sequence, which Qwen2.5-VL's blocks reorder by windows."""

    def __init__(self, model, batch):
        self.visual = model.model.visual
        self.grids = batch["image_grid_thw"]
        self.attentions = [block.attn for block in self.visual.blocks]
        self.gated = hasattr(self.visual.blocks[0].mlp, "gate_proj")
        mlp = ("gate_proj", "up_proj", "down_proj") if self.gated else ("linear_fc1", "linear_fc2")
        self.linears = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in mlp))

    def record(self, recorder):
        record_blocks(recorder, self.visual.blocks, "attn", "attn.proj", self.linears)
        recorder.output("projector.merger", self.visual, "pooler_output")
        for merger in getattr(self.visual, "deepstack_merger_list", ()):
            recorder.output("projector.deepstack_merger_list", merger)

    def sites(self, recorder, calls):
        patches = self.grids.prod(-1).tolist()
        merged = [n // MERGE**2 for n in patches]
        order = self.processor_order()
        sites = {
            name: per_image(recorder.stack(name)[:, order], patches)
            for name in recorder.seen
            if name.startswith("visual.")
        }
        sites["visual.embeddings"] = sites["visual.resid_pre"][0]
        sites["visual.head_out"] = sites["visual.head_out"].unflatten(-1, (self.attentions[0].num_heads, -1))
        sites["projector.merger"] = per_image(recorder.one("projector.merger"), merged)
        if "projector.deepstack_merger_list" in recorder.seen:
            name = "projector.deepstack_merger_list"
            sites[name] = per_image(recorder.stack(name), merged)
        for item, name in enumerate(("visual.attn_scores", "visual.attn_probs")):
            maps = torch.stack([whole([call[item] for call in calls[m]]) for m in self.attentions])
            maps = maps[..., order, :][..., order]
            sites[name] = maps_per_image(maps if item else maps.masked_fill(maps == 0, torch.nan), patches)
        return sites

    def processor_order(self):
        """Where each patch of the processor's order stands in the order of the blocks."""
        config = self.visual.config
        count = self.grids.prod(-1).sum()
        if not hasattr(config, "window_size"):
            return torch.arange(count)
        index, _ = get_vision_window_index(torch.from_numpy(self.grids), MERGE, config.window_size, config.patch_size)
        return torch.arange(count).unflatten(0, (-1, MERGE**2))[index.argsort()].flatten()


class ViTTower:
    """Images of one size, as transformers' SigLIP and CLIP take them; LLaVA needs only some of the layers."""

    def __init__(self, model, batch):
        config = model.config
        tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        depth = config.vision_config.num_hidden_layers
        if config.model_type == "llava":
            chosen = config.vision_feature_layer
            depth = max(i % (depth + 1) for i in ([chosen] if isinstance(chosen, int) else chosen))
        self.blocks = tower.encoder.layers[:depth]
        self.attentions = [block.self_attn for block in self.blocks]

    def record(self, recorder):
        linears = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        record_blocks(recorder, self.blocks, "self_attn", "self_attn.out_proj", [*linears, "mlp.fc1", "mlp.fc2"])
        for name, module in self.projector.named_children():
            if name in ("mm_soft_emb_norm", "linear_1", "linear_2") and not isinstance(module, torch.nn.Identity):
                recorder.output(f"projector.{name}", module)
        if hasattr(self.projector, "mm_input_projection_weight"):
            recorder.output("projector.mm_input_projection", self.projector)

    def sites(self, recorder, calls):
        sites = {name: recorder.stack(name) for name in recorder.seen if name.startswith("visual.")}
        sites["visual.embeddings"] = sites["visual.resid_pre"][0]
        sites["visual.head_out"] = sites["visual.head_out"].unflatten(-1, (self.attentions[0].num_heads, -1))
        sites |= {name: recorder.one(name) for name in recorder.seen if name.startswith("projector.")}
        for item, name in enumerate(("visual.attn_scores", "visual.attn_probs")):
            sites[name] = torch.stack([calls[m][0][item] for m in self.attentions])
        return sites


TOWERS = {"qwen3_vl": QwenTower, "qwen2_5_vl": QwenTower, "gemma3": ViTTower, "llava": ViTTower}


def record_blocks(recorder, blocks, attention, writer, linears):
    for block in blocks:
        recorder.input("visual.resid_pre", block)
        recorder.input("visual.head_out", block.get_submodule(writer))
        recorder.output("visual.attn_out", block.get_submodule(attention))
        recorder.output("visual.mlp_out", block.mlp)
        recorder.output("visual.resid_post", block)
        for name in linears:
            recorder.output(f"visual.{name}", block.get_submodule(name))


def whole(chunks):
    """(1, H, n, n) attention maps of successive chunks -> (H, N, N), zero between them."""
    return torch.stack([torch.block_diag(*(chunk[0, head] for chunk in chunks)) for head in range(chunks[0].shape[1])])


def per_image(x, counts):
    """(..., N, D) over all images' patches -> (..., I, max count, D), NaN past each image's own."""
    images = [part.movedim(-2, 0) for part in x.split(counts, dim=-2)]
    padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=torch.nan)
    return padded.movedim((0, 1), (-3, -2))


def maps_per_image(x, counts):
    """(L, H, N, N) over all images' patches -> (L, I, H, max count, max count), NaN past each image's own."""
    ends, most = np.cumsum(counts), max(counts)
    parts = [x[..., end - n : end, end - n : end] for end, n in zip(ends, counts, strict=True)]
    pads = [(0, most - n, 0, most - n) for n in counts]
    return torch.stack(
        [torch.nn.functional.pad(p, pad, value=torch.nan) for p, pad in zip(parts, pads, strict=True)], 1
    )


# Interventions, as hooks


def text_layers(model):
    return getattr(model.model, "language_model", model.model).layers


def writer(layer, module):
    """The torch module whose output the residual stream gets from "attn" or "mlp": Gemma's second norm where it is."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_attention_layernorm if module == "attn" else layer.post_feedforward_layernorm
    return layer.self_attn if module == "attn" else layer.mlp


def reader(model, layer):
    """The torch module whose input is what a layer leaves in the residual stream, DeepStack's addition included."""
    layers = text_layers(model)
    norm = getattr(model.model, "language_model", model.model).norm
    return layers[layer + 1] if layer + 1 < len(layers) else norm


@contextmanager
def edited(*edits):
    """Runs with edits ``(module, "input" or "output", function of the hidden states)`` in place."""

    def on_output(function):
        def hook(_, __, out):
            return function(out) if isinstance(out, torch.Tensor) else (function(out[0]), *out[1:])

        return hook

    def on_input(function):
        def hook(_, args, kwargs):
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        return hook

    handles = [
        module.register_forward_hook(on_output(function))
        if side == "output"
        else module.register_forward_pre_hook(on_input(function), with_kwargs=True)
        for module, side, function in edits
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_edited(edits):
    """Runs with other attention probabilities: ``edits`` maps attention modules to functions of their scores and of
    the mask that is added to these, both ``(B, H, S, keys)``."""
    files = {sys.modules[type(module).__module__] for module in edits}
    eager = {file: file.eager_attention_forward for file in files}

    def edit(file):
        def forward(module, query, key, value, attention_mask, *args, **kwargs):
            if module not in edits:
                return eager[file](module, query, key, value, attention_mask, *args, **kwargs)
            assert kwargs.get("softcap") is None
            repeats = query.shape[1] // key.shape[1]
            scores = query @ key.repeat_interleave(repeats, 1).mT * kwargs["scaling"]
            added = torch.zeros(()) if attention_mask is None else attention_mask[..., : scores.shape[-1]]
            probs = edits[module](scores, added)
            return (probs @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous(), probs

        return forward

    for file in files:
        file.eager_attention_forward = edit(file)
    try:
        yield
    finally:
        for file in files:
            file.eager_attention_forward = eager[file]


def part_masks(config, rows, side="left"):
    """For the rows of :func:`make_batch`, whose last two parts are the question and the answer: which tokens are
    visual, end an image, come behind a row's first image, or are the question's or the answer's, ``(B, T)`` bool."""
    names = ("image", "image_end", "behind", "question", "answer")
    marked = 0 if config.model_type == "llava" else 1
    found = []
    for row in rows:
        tokens, seen = [], False
        for number, part in enumerate(row):
            if isinstance(part, int):
                own = {"question": number == len(row) - 2, "answer": number == len(row) - 1, "behind": seen}
                tokens += [own] * part
            else:
                between = [{"behind": seen}] * marked
                visual = [{"image": True}] * visual_tokens(config, *part)
                tokens, seen = [*tokens, *between, *visual, *[{"image_end": True}] * marked], True
        found.append(tokens)
    length = max(map(len, found))
    masks = {name: np.zeros((len(rows), length), bool) for name in names}
    for i, tokens in enumerate(found):
        at = length - len(tokens) if side == "left" else 0
        for name in names:
            masks[name][i, at : at + len(tokens)] = [token.get(name, False) for token in tokens]
    return masks
