"""Diffusion: noise levels, samplers, the probability flow and training."""
