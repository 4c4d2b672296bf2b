"""Processes that are always on."""
