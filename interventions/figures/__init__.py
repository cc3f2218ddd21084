"""Figures of the analyses: data in, one file out."""
