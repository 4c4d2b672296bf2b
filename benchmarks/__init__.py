"""Measured claims: each module is one command."""
