"""The asset graph, one module a stage, each with its checks beside it."""
