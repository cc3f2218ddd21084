"""The sites of transformers' vision towers in vlm_jax's layout."""

import numpy as np
import torch
from transformers.vision_utils import get_vision_window_index

from hf_oracle.family import MERGE


class QwenTower:
    """The patches of all images in one sequence, which Qwen2.5-VL's blocks reorder by windows."""

    def __init__(self, model, batch, depth=None):
        self.visual = model.model.visual
        self.grids = batch["image_grid_thw"]
        self.attentions = [block.attn for block in self.visual.blocks]
        self.gated = hasattr(self.visual.blocks[0].mlp, "gate_proj")
        mlp = ("gate_proj", "up_proj", "down_proj") if self.gated else ("linear_fc1", "linear_fc2")
        self.linears = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in mlp))

    def record(self, recorder):
        record_blocks(recorder, self.visual.blocks, "attn", "attn.proj", self.linears)
        recorder.output("projector.merger", self.visual, "pooler_output")
        record_merger(recorder, "projector.merger", self.visual.merger)
        for merger in getattr(self.visual, "deepstack_merger_list", ()):
            recorder.output("projector.deepstack_merger_list", merger)
            record_merger(recorder, "projector.deepstack_merger_list", merger)

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
        for name in filter(lambda name: name.startswith("projector.merger."), recorder.seen):
            sites[name] = per_image(recorder.one(name)[self.merged_order()], merged)
        for name in filter(lambda name: "deepstack" in name, recorder.seen):
            sites[name] = per_image(recorder.stack(name), merged)
        for item, name in enumerate(("visual.attn_scores", "visual.attn_probs")):
            maps = torch.stack([whole([call[item] for call in calls[m]]) for m in self.attentions])
            maps = maps[..., order, :][..., order]
            sites[name] = maps_per_image(maps if item else maps.masked_fill(maps == 0, torch.nan), patches)
        return sites

    def processor_order(self):
        """Where each patch of the processor's order stands in the order of the blocks."""
        return torch.arange(self.grids.prod(-1).sum()).unflatten(0, (-1, MERGE**2))[self.merged_order()].flatten()

    def merged_order(self):
        """The same for visual tokens, of which each is made of several patches."""
        config = self.visual.config
        if not hasattr(config, "window_size"):
            return torch.arange(self.grids.prod(-1).sum() // MERGE**2)
        index, _ = get_vision_window_index(torch.from_numpy(self.grids), MERGE, config.window_size, config.patch_size)
        return index.argsort()


class ViTTower:
    """Images of one size, as transformers' SigLIP and CLIP take them; only the first ``depth`` layers matter."""

    def __init__(self, model, batch, depth=None):
        tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
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


def record_merger(recorder, site, merger):
    """The linears of a merger, which Qwen2.5-VL calls by numbers."""
    names = {"linear_1": "mlp.0", "linear_2": "mlp.2"} if hasattr(merger, "mlp") else {}
    for name in names or ("linear_fc1", "linear_fc2"):
        recorder.output(f"{site}.{name}", merger.get_submodule(names.get(name, name)))


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
