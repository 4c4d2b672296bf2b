"""Challenger against champion on held-out observations."""
