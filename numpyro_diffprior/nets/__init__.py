r"""Noise-conditional networks, as flax nnx modules.

A network maps noisy events and their noise levels to arrays of the events' shape,

.. math:: F : (x, c) \mapsto F(x, c), \qquad c = \log(\sigma / s) / 4,

for a batch of events: ``x`` has shape ``(batch, *event_shape)``, ``c`` has shape ``(batch,)``, or
``(1,)`` for a level that all share, as on a sampler's path: what depends on it is computed once.
The output layer starts at zero, so that a denoiser preconditioned by a Gaussian starts as the
Gaussian's. A module is a pytree whose leaves are its weights; all else about it is static and
hashable, so that networks of one architecture share compiled functions. Called with `rngs`, a
network trains (dropout, from the stream ``"dropout"``); without, it is deterministic. With a
`context_shape`, it is called with a context as well, a label or a redshift of each event, which
enters beside the noise level.

References:
    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative
    models* (EDM), 2022, arXiv 2206.00364.

    Dhariwal, Nichol, *Diffusion models beat GANs on image synthesis*, 2021, arXiv 2105.05233
    (normalization modulated by the noise level).
"""

from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet

__all__ = ["MLP", "NETWORKS", "UNet"]

NETWORKS: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}
"""Networks that a file can name: ``NETWORKS[name](**net.config, rngs=rngs)``."""
