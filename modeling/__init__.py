"""Language-model training without an orchestrator: data, models, optimizers, training, export.

Values in, values out. Clocks, environment variables, the network and Dagster stay in `resources`
and `assets`; nothing here imports `dagster`.
"""
