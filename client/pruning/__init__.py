"""Structured pruning: what of a model can be removed, which of it should be, and removing it for real."""
