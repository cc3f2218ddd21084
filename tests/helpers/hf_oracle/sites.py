"""Every site of a transformers model by forward hooks, under vlm_jax's names and in its layout."""

import torch

from hf_oracle.batches import positions, tensors
from hf_oracle.float64 import computing_in
from hf_oracle.models import family_of
from hf_oracle.recording import Recorder, attention_recorded


def oracle_sites(model, batch):
    """``{site: float32 array}`` in vlm_jax's layout, NaN where nothing is promised (padded tokens, patches past an
    image). A float64 model computes all of it in float64, and each number is rounded once, at the end."""
    text, family = getattr(model.model, "language_model", model.model), family_of(model.config)
    tower = None
    if "pixel_values" in batch:
        tower = family.tower(model, batch, family.tower_depth and family.tower_depth(model.config))
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
    if family.deepstack:
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


def blank(x, where):
    return x.masked_fill(where, torch.nan)
