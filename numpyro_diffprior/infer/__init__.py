"""Inference with diffusion priors in NumPyro models."""
