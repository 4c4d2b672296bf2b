"""Processes that consume and compute."""
