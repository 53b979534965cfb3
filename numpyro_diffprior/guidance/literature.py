r"""Guidance of the literature, to compare with: DPS, PiGDM and TMPD.

They have the interface of `MMPS`, and use a simpler covariance of :math:`x` given :math:`x_t`, or
none.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_number, set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import IsotropicPriorCovariance, pull_back
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood, Linearization, gaussian_log_density
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.linalg.covariances import Diagonal

__all__ = ["DPS", "TMPD", "PiGDM"]


def PiGDM() -> MMPS:  # noqa: N802  # named as the method
    r"""Return pseudoinverse guidance (Song et al., ICLR 2023), for noisy linear observations.

    This is MMPS with :math:`V = r^2 I`, :math:`r^2 = \sigma^2 s^2 / (\sigma^2 + s^2)`; the paper's
    data have unit scale :math:`s`. The guidance enters through the score, at full weight.
    """
    return MMPS(IsotropicPriorCovariance())


@jax.tree_util.register_static
@dataclass(frozen=True)
class TMPD(Guidance):
    r"""Tweedie moment projected diffusions (Boys et al., 2023, arXiv 2310.06721).

    :math:`A V A^T` is replaced by the diagonal of its row sums, :math:`A V A^T 1`, which takes one
    more vector-Jacobian product; negative sums are set to zero.
    """

    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        return _TMPDPosterior(denoiser, likelihood)


@dataclass(frozen=True, eq=False)
class _TMPDPosterior(GuidedDenoiser):
    """The denoiser of a posterior by `TMPD`."""

    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
        x_hat, pull = pull_back(self.prior, x_t, sigma)
        local = self.likelihood.linearize(x_hat)
        row_sums = local.matvec(pull(local.transpose(jnp.ones_like(local.residual))))
        noisy = Diagonal(local.noise.diagonal() + jnp.maximum(row_sums, 0))
        solution = noisy.solve(local.residual)
        correction = pull(local.transpose(solution))
        return _guided(x_hat, correction, local, solution, noisy.logdet())


@jax.tree_util.register_static
@dataclass(frozen=True)
class DPS(Guidance):
    r"""Diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687).

    .. math:: E[x \mid x_t, y] \approx \hat x - \zeta \, s \,
        \nabla_{x_t} \lVert y - h(\hat x) \rVert

    The paper shifts each step of its sampler by a multiple of this gradient. Here the multiple is
    per unit of :math:`\log \sigma`, so that it does not depend on the number of steps; the prior's
    scale :math:`s` replaces the unit scale of the paper's data, and :math:`y` is taken to be in
    the units of :math:`x`.

    Args:
        strength: The factor :math:`\zeta`.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        strength = check_number("DPS", "strength", self.strength, inclusive=True)
        set_fields(self, strength=strength)

    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        return _DPSPosterior(denoiser, likelihood, self.strength)


@dataclass(frozen=True, eq=False)
class _DPSPosterior(GuidedDenoiser):
    """The denoiser of a posterior by `DPS`."""

    strength: float

    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
        x_hat, pull = pull_back(self.prior, x_t, sigma)
        local = self.likelihood.linearize(x_hat)
        norm = jnp.linalg.norm(local.residual, axis=-1, keepdims=True)
        direction = local.residual / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        gradient = pull(local.transpose(direction)) / sigma[..., None] ** 2
        shift = self.strength * self.prior.scale * gradient
        solution = local.noise.solve(local.residual)
        return _guided(x_hat, shift, local, solution, local.noise.logdet())


def _guided(
    x_hat: jax.Array,
    correction: jax.Array,
    local: Linearization,
    solution: jax.Array,
    logdet: jax.Array,
) -> Guided:
    """Return the result of guidance from its correction, which took no iterative solver."""
    log_twist = gaussian_log_density(local.residual, solution, logdet)
    return Guided(
        x_hat=x_hat,
        x_hat_y=x_hat + correction.reshape(x_hat.shape),
        log_twist=log_twist,
        stats=SolveStats.of(jnp.zeros_like(log_twist)),
    )
