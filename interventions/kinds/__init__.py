"""The kinds of intervention, one file per subject. What they share, and the rules they follow: :mod:`.base`."""

from interventions.kinds.add import Add, Noise
from interventions.kinds.attention import AttentionKnockout, UniformAttention
from interventions.kinds.gates import Gate, HeadGate
from interventions.kinds.lora import LoRA
from interventions.kinds.loreft import LoReFT
from interventions.kinds.patch import Patch, Replace
from interventions.kinds.project_out import ProjectOut

__all__ = [
    "Add",
    "AttentionKnockout",
    "Gate",
    "HeadGate",
    "LoRA",
    "LoReFT",
    "Noise",
    "Patch",
    "ProjectOut",
    "Replace",
    "UniformAttention",
]
