"""Deployment of Slipstream."""
