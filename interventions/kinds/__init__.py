"""The kinds of intervention, one file per subject. :mod:`interventions.kinds.base` has what they share."""

from interventions.kinds.ablation import Ablation, Means
from interventions.kinds.add import Add, Noise
from interventions.kinds.attention import AttentionKnockout, UniformAttention
from interventions.kinds.base import KINDS
from interventions.kinds.gates import Gate, HeadGate
from interventions.kinds.hook import Hook, hook
from interventions.kinds.latents import Latents
from interventions.kinds.layers import Layers, at
from interventions.kinds.lora import LoRA
from interventions.kinds.patch import Patch, Replace
from interventions.kinds.project_out import ProjectOut
from interventions.kinds.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT

__all__ = [
    "KINDS",
    "Ablation",
    "Add",
    "AttentionKnockout",
    "ConsReFT",
    "DiReFT",
    "Gate",
    "HeadGate",
    "Hook",
    "Latents",
    "Layers",
    "LoRA",
    "LoReFT",
    "LobiReFT",
    "Means",
    "NoReFT",
    "NodiReFT",
    "Noise",
    "Patch",
    "ProjectOut",
    "Replace",
    "UniformAttention",
    "at",
    "hook",
]
