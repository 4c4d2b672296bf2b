"""Observations in, draft versions out."""
