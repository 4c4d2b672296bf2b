"""Decoders, their checkpoints and their weights."""
