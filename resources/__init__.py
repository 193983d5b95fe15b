"""Handles on the outside world: artifact store, launcher of JAX processes, tracker, provenance."""
