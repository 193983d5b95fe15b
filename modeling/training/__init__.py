"""The training engine: state, step, loop, mesh, precision, checkpoints."""
