"""Model architectures in named tensors, one file each; `config` holds their hyperparameters."""
