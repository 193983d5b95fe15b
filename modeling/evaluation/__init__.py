"""Perplexity, bits per byte and samples of a trained model, as a report."""
