r"""Learned denoisers: the exact denoiser of a Gaussian, corrected by a network.

References:
    Karras et al., *Elucidating the design space of diffusion-based generative models* (EDM),
    NeurIPS 2022, arXiv 2206.00364.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffprior._compile.checks import set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser, align, as_gaussian, register
from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.linalg.covariances import Covariance, Isotropic
from numpyro_diffprior.nets.adapters import as_network, context_shape

__all__ = ["Network", "NetworkDenoiser"]


class Network(Protocol):
    """The interface of a network of `NetworkDenoiser`, such as `MLP`, `UNet` or `DiT`.

    A network with an attribute ``context_shape`` that is not None gets contexts as third argument,
    with shape ``(batch, *context_shape)``.
    """

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one event."""

    def __call__(
        self, x: jax.Array, noise: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Map ``x`` of shape ``(batch, *event)``; ``noise`` has shape ``(batch,)`` or ``(1,)``."""


# Fixed, so that measuring the ratios does not change the shapes of a compiled prior.
_NUM_RATIOS = 32


@register
@dataclass(frozen=True, eq=False, init=False)
class NetworkDenoiser(Denoiser):
    r"""A learned denoiser: the exact denoiser of a Gaussian, corrected by a network.

    .. math:: D(x_t, \sigma) = E_{\mathcal{N}(\mu, \Sigma)}[x \mid x_t]
        + c_{out} F\bigl(c_{in} (x_t - \mu), \tfrac{1}{4} \log \tfrac{\sigma}{s}\bigr), \quad
        c_{out} = \frac{s \sigma}{\sqrt{s^2 + \sigma^2}}, \quad
        c_{in} = \frac{1}{\sqrt{s^2 + \sigma^2}}

    with :math:`s^2` the mean variance of an element. An isotropic :math:`\Sigma = s^2 I` gives
    EDM's preconditioning (Karras et al. 2022, table 1) with location and scale; with a fitted
    covariance, the network only learns the deviation from a Gaussian. The networks of this package
    initially return zero, so that an untrained denoiser is exact for the Gaussian.

    Args:
        net: A network on ``(batch, *event)``: a flax nnx module, whose ``nnx.Param`` are
            trained, or any callable pytree (see `FunctionNetwork`).
        mean: The data's mean, with shape ``event_shape`` (default: zero).
        cov: The data's covariance over flattened events, or a matrix (default: the identity).
        base: The Gaussian of the preconditioning (default: that of ``mean`` and ``cov``). It stays
            fixed while EM updates ``mean`` and ``cov``, because changing it under a trained
            network would change the prior.
        error_ratios: The `error_ratio` at log-spaced noise levels from `sigma_min` to `sigma_max`
            (default: one at every level); see `measure_error`.
        unit: The unit of mean and covariance in units of the data; `EM` and `fit_denoiser` set it.

    Raises:
        ValueError: If the shapes of network, mean, covariance and base differ.
    """

    net: Network
    mean: jax.Array
    cov: Covariance
    base: GaussianDenoiser
    error_ratios: jax.Array
    unit: jax.Array

    def __init__(
        self,
        net: Network,
        mean: ArrayLike | None = None,
        cov: Covariance | ArrayLike | None = None,
        base: GaussianDenoiser | None = None,
        error_ratios: ArrayLike | None = None,
        unit: ArrayLike = 1.0,
    ) -> None:
        net = as_network(net)
        shape = tuple(net.event_shape)
        summary = as_gaussian(
            self,
            jnp.zeros(shape) if mean is None else mean,
            Isotropic(1.0, prod(shape)) if cov is None else cov,
            unit,
        )
        base = GaussianDenoiser(**summary) if base is None else base
        for name, found in (("mean", summary["mean"].shape), ("base", base.event_shape)):
            if found != shape:
                raise ValueError(
                    f"NetworkDenoiser: the network's events have shape {shape}, "
                    f"those of the {name} have shape {found}."
                )
        dtype = summary["mean"].dtype
        ratios = jnp.ones(_NUM_RATIOS, dtype) if error_ratios is None else error_ratios
        ratios = jnp.asarray(ratios, dtype)
        set_fields(self, net=net, base=base, error_ratios=ratios, **summary)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """The shape of the network's contexts, if it has any."""
        return context_shape(self.net)

    def __call__(
        self,
        x_t: jax.Array,
        sigma: jax.Array | float,
        context: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Return the conditional mean; with ``rngs``, in training mode (dropout).

        Contexts have shape ``(n, *context_shape)``, one for each of the ``n`` events in the batch.

        Raises:
            ValueError: If the network takes a context and none is given; see `condition`.
        """
        batch_shape = x_t.shape[: x_t.ndim - len(self.event_shape)]
        sigma = jnp.asarray(sigma, self.dtype)
        level = align(sigma, self.event_shape)
        scale = self.base.scale
        c_in = jax.lax.rsqrt(scale**2 + level**2)
        net_in = (c_in * (x_t - self.base.mean)).reshape(-1, *self.event_shape)
        # The network is not trained below `sigma_min`, and gets that level there.
        noise = jnp.log(jnp.maximum(sigma, self.sigma_min) / scale) / 4
        if noise.ndim:
            noise = jnp.broadcast_to(noise, batch_shape)
        if self.context_shape is not None and context is None:
            raise ValueError(
                "NetworkDenoiser: expected a context of shape "
                f"{self.context_shape}, got none; give one by `prior.condition(context)`."
            )
        contexts = () if self.context_shape is None else (context,)
        net_out = self.net(net_in, noise.reshape(-1), *contexts, rngs=rngs).reshape(x_t.shape)
        return self.base(x_t, sigma) + c_in * scale * level * net_out

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        grid = jnp.linspace(low, high, len(self.error_ratios))
        log_sigma = jnp.log(jnp.asarray(sigma, self.dtype))
        return jnp.interp(log_sigma, grid, self.error_ratios)

    def in_unit(self, unit: jax.Array) -> "NetworkDenoiser":
        ratio = self.unit / unit
        return NetworkDenoiser(
            self.net,
            ratio * self.mean,
            self.cov.scale(ratio**2),
            self.base.in_unit(unit),
            self.error_ratios,
            unit,
        )

    def with_gaussian(
        self, mean: jax.Array, cov: Covariance, unit: ArrayLike | None = None
    ) -> "NetworkDenoiser":
        """Return this denoiser with a new Gaussian as its preconditioning and its summary.

        The error ratios are reset to one.

        Args:
            mean: The mean.
            cov: The covariance.
            unit: Their unit (default: the denoiser's).
        """
        return NetworkDenoiser(self.net, mean, cov, unit=self.unit if unit is None else unit)

    def with_summary(self, mean: jax.Array, cov: Covariance) -> "NetworkDenoiser":
        """Return this denoiser with a new Gaussian summary and the same preconditioning.

        The error ratios are reset to one: they were measured with the previous summary.
        """
        return NetworkDenoiser(self.net, mean, cov, self.base, unit=self.unit)
