"""Interventions on a forward pass, the sweep engine, and one file per analysis."""

from interventions.causal import Trace, causal_trace
from interventions.groups import GROUPS, bind, label
from interventions.kinds import (
    Add,
    AttentionKnockout,
    Gate,
    HeadGate,
    LoRA,
    LoReFT,
    Noise,
    Patch,
    ProjectOut,
    Replace,
    UniformAttention,
)
from interventions.read import Gold, Logits, Scores
from interventions.store import describe, digest, load_interventions, save_interventions
from interventions.sweep import Variants, generate_variants, stack, sweep, sweep_runs

__all__ = [
    "GROUPS",
    "Add",
    "AttentionKnockout",
    "Gate",
    "Gold",
    "HeadGate",
    "LoRA",
    "LoReFT",
    "Logits",
    "Noise",
    "Patch",
    "ProjectOut",
    "Replace",
    "Scores",
    "Trace",
    "UniformAttention",
    "Variants",
    "bind",
    "causal_trace",
    "describe",
    "digest",
    "generate_variants",
    "label",
    "load_interventions",
    "save_interventions",
    "stack",
    "sweep",
    "sweep_runs",
]
