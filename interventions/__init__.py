"""Interventions on a forward pass, the sweep engine, and one file per analysis."""

from interventions.kinds import Add, LoRA, Patch
from interventions.sweep import sweep
from interventions.trace import Trace, causal_trace

__all__ = ["Add", "LoRA", "Patch", "Trace", "causal_trace", "sweep"]
