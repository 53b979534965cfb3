"""Diffusion priors for NumPyro, learned from the observations alone.

A diffusion prior is a distribution over ``x`` (an image, a field, a trajectory, a vector) that is
defined by a denoiser ``D(x_t, sigma) = E[x | x_t]`` with ``x_t = x + sigma * eps``. It stands in
an ordinary NumPyro model like any other distribution.
"""

__version__ = "0.1.0.dev0"

__all__ = ["__version__"]
