"""Measure the attention entropies of a trained model: a run of this project, or a model of the transformers library."""
