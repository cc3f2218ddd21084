"""Paired comparison of two runs of one command: what changed from one state of a model to another."""
