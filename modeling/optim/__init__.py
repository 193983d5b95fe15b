"""Optimizers and schedules, built from Optax by name."""
