"""Interventions on a forward pass, the sweep engine, and one room per analysis."""

from interventions.ablations import reference_means, resampled
from interventions.asking import ask, tokens_of
from interventions.compare.runs import compare
from interventions.dictionary import Dictionary
from interventions.engine.generation import generate_variants
from interventions.engine.read import Gold, Logits, Scores
from interventions.engine.sweep import sweep, sweep_runs
from interventions.engine.variants import Variants, stack
from interventions.kinds.ablation import Ablation
from interventions.kinds.add import Add, Noise
from interventions.kinds.attention import AttentionKnockout, UniformAttention
from interventions.kinds.gates import Gate, HeadGate
from interventions.kinds.groups import GROUPS, bind, label
from interventions.kinds.hook import hook
from interventions.kinds.latents import Latents
from interventions.kinds.layers import at
from interventions.kinds.lora import LoRA
from interventions.kinds.packed import describe, digest
from interventions.kinds.patch import Patch, Replace
from interventions.kinds.project_out import ProjectOut
from interventions.kinds.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from interventions.steering import difference_of_means
from interventions.store import load_interventions, save_interventions
from interventions.trace.causal import Trace, causal_trace

__all__ = [
    "GROUPS",
    "Ablation",
    "Add",
    "AttentionKnockout",
    "ConsReFT",
    "DiReFT",
    "Dictionary",
    "Gate",
    "Gold",
    "HeadGate",
    "Latents",
    "LoRA",
    "LoReFT",
    "LobiReFT",
    "Logits",
    "NoReFT",
    "NodiReFT",
    "Noise",
    "Patch",
    "ProjectOut",
    "Replace",
    "Scores",
    "Trace",
    "UniformAttention",
    "Variants",
    "ask",
    "at",
    "bind",
    "causal_trace",
    "compare",
    "describe",
    "difference_of_means",
    "digest",
    "generate_variants",
    "hook",
    "label",
    "load_interventions",
    "reference_means",
    "resampled",
    "save_interventions",
    "stack",
    "sweep",
    "sweep_runs",
    "tokens_of",
]
