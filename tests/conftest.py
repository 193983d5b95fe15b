"""Strictness for every test: no silent rank promotion, no implicit dtype promotion, eight devices.

JAX reads `XLA_FLAGS` once, when its first backend starts, so the flags are set before any import.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
