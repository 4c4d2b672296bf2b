"""Drafters: how tokens are proposed for verification."""
