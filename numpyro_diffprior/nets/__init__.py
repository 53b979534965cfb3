r"""Noise-conditional networks, as flax nnx modules.

A network maps noisy events and their noise levels to arrays of the events' shape,

.. math:: F : (x, c) \mapsto F(x, c), \qquad c = \log(\sigma / s) / 4,

with the data's scale :math:`s`. ``x`` has shape ``(batch, *event_shape)``; ``c`` has shape
``(batch,)``, or ``(1,)`` if all events share a noise level, whose embedding is then computed once.
The output layer is initialized to zero, so that an untrained `NetworkDenoiser` is the denoiser of
its Gaussian. A module is a pytree whose leaves are its weights; everything else is static and
hashable, so that networks of one architecture share compiled functions. With `rngs`, a network
runs in training mode (dropout, from the stream ``"dropout"``); without, it is deterministic. A
network with a `context_shape` also takes one context per event, such as a label or a redshift,
which is embedded together with the noise level.

References:
    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative
    models* (EDM), 2022, arXiv 2206.00364.

    Dhariwal, Nichol, *Diffusion models beat GANs on image synthesis*, 2021, arXiv 2105.05233
    (normalization modulated by the noise level).
"""

from numpyro_diffprior.nets.dit import DiT
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet

__all__ = ["MLP", "NETWORKS", "DiT", "UNet"]

NETWORKS: dict[str, type[MLP] | type[UNet] | type[DiT]] = {"DiT": DiT, "MLP": MLP, "UNet": UNet}
"""Networks that `load_denoiser` can build, as ``NETWORKS[name](**config, rngs=rngs)``."""
