r"""Guidance: from a prior's denoiser and a likelihood to the denoiser of the posterior.

Tweedie's formula for :math:`p(x_t \mid y)` gives the posterior's denoiser

.. math:: E[x \mid x_t, y] = \hat x + \sigma^2 \nabla_{x_t} \log p(y \mid x_t), \quad
    \hat x = D(x_t, \sigma).

Moment matching posterior sampling (MMPS) approximates :math:`p(x \mid x_t)` by a Gaussian with
covariance :math:`V`, so that with a mean :math:`h`, linearised to :math:`A` at :math:`\hat x`,

.. math:: p(y \mid x_t) \approx \mathcal{N}(y; h(\hat x), S), \quad S = \Sigma_y + A V A^T, \quad
    E[x \mid x_t, y] \approx \hat x + \sigma^2 J^T A^T S^{-1} (y - h(\hat x)),

where :math:`J = \partial D / \partial x_t` enters by one vector-Jacobian product. It is exact for
Gaussian priors with linear observations when :math:`V` is the conditional covariance. The Gaussian
approximation of :math:`p(y \mid x_t)` is also the *twist* of the particle samplers.

The solve is made for each event alone: no inner product runs over the batch.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712, section 4.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers import Denoiser
from numpyro_diffprior.likelihoods import Likelihood, Linearization, gaussian_log_density
from numpyro_diffprior.linalg import (
    Covariance,
    Diagonal,
    Isotropic,
    by_matrix,
    conjugate_gradient,
    truncated_solve,
)

__all__ = [
    "DPS",
    "MMPS",
    "TMPD",
    "CalibratedCovariance",
    "GaussianCovariance",
    "Guidance",
    "Guided",
    "GuidedDenoiser",
    "IsotropicCovariance",
    "PiGDM",
    "TweedieCovariance",
    "UnitCovariance",
]

_Pull = Callable[[jax.Array], jax.Array]


class Guided(NamedTuple):
    r"""What guidance finds at one noise level.

    Attributes:
        x_hat: The prior's mean :math:`E[x \mid x_t]`, with shape ``(*batch, *event)``.
        x_hat_y: The posterior's mean :math:`E[x \mid x_t, y]`, likewise.
        log_twist: The approximate :math:`\log p(y \mid x_t)`, with shape ``(*batch,)``, without
            its log-determinant where the solve is matrix-free. A hidden value (a zero row with
            unit noise) adds the constant of its Gaussian.
        residual: The relative residual of the solve, with shape ``(*batch,)``; zero where
            there was none, or an exact one.
        num_truncated: The number of directions with negative prior variance, likewise; zero
            where the solve is matrix-free.
    """

    x_hat: jax.Array
    x_hat_y: jax.Array
    log_twist: jax.Array
    residual: jax.Array
    num_truncated: jax.Array


@dataclass(frozen=True, eq=False)
class GuidedDenoiser(Denoiser):
    """The denoiser of a posterior: any sampler runs it. Made by `Guidance.condition`.

    Args:
        denoiser: The prior.
        likelihood: The likelihood of the observed batch.
        guidance: The approximation.
        operator: The likelihood's operator as matrices, where it is the same at all ``x``.
    """

    denoiser: Denoiser
    likelihood: Likelihood
    guidance: "Guidance"
    operator: jax.Array | None = None

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return self.denoiser.mean

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance."""
        return self.denoiser.cov

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the posterior's conditional mean; see `Denoiser`."""
        return self.guide(x_t, sigma).x_hat_y

    def guide(self, x_t: jax.Array, sigma: jax.Array | float) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        return self.guidance.guide(self, x_t, jnp.asarray(sigma, self.dtype))


class Guidance(ABC):
    """An approximation of the posterior's denoiser."""

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior.

        Raises:
            ValueError: If prior and likelihood have different event shapes.
        """
        if denoiser.event_shape != likelihood.event_shape:
            raise ValueError(
                f"guidance: the prior's events have shape {denoiser.event_shape}, "
                f"the likelihood's {likelihood.event_shape}."
            )
        return GuidedDenoiser(denoiser, likelihood, self)

    @abstractmethod
    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level; see `GuidedDenoiser.guide`."""


class PosteriorCovariance(ABC):
    r"""A closed form for :math:`V`, the covariance of :math:`x` given :math:`x_t`."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        """Return the covariance at noise level ``sigma``."""


@dataclass(frozen=True)
class GaussianCovariance(PosteriorCovariance):
    r"""That of a Gaussian prior, :math:`(\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}`."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.harmonic(sigma**2)


@dataclass(frozen=True)
class CalibratedCovariance(PosteriorCovariance):
    r"""That of a Gaussian prior, scaled to the error that the denoiser makes.

    .. math:: r(\sigma) \, (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}, \quad
        r(\sigma) = E \lVert x - D(x_t, \sigma) \rVert^2
        / \mathrm{tr} (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}

    A prior that is not Gaussian leaves less open at medium noise than a Gaussian of its covariance
    would: half as much, on digits. The ratio is that of `Denoiser.error_ratio`; without a measured
    one, this is `GaussianCovariance`.
    """

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.harmonic(sigma**2).scale(denoiser.error_ratio(sigma))


@dataclass(frozen=True)
class IsotropicCovariance(PosteriorCovariance):
    r"""The heuristic :math:`\Sigma_t = \sigma^2 I`, of a flat prior."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return Isotropic(sigma**2, denoiser.event_size)


@dataclass(frozen=True)
class UnitCovariance(PosteriorCovariance):
    r"""The heuristic :math:`(I / s^2 + \Sigma_t^{-1})^{-1}`, with the prior's scale :math:`s`."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        variance = 1 / (1 / denoiser.scale**2 + 1 / sigma**2)
        return Isotropic(variance, denoiser.event_size)


@dataclass(frozen=True)
class TweedieCovariance:
    r"""The covariance of the prior itself, :math:`V = \sigma^2 J` (Tweedie's second formula).

    The Jacobian of a learned denoiser is not symmetric positive semi-definite: directions of
    observation space without positive variance get no correction.
    """


@dataclass(frozen=True)
class MMPS(Guidance):
    r"""Moment matching posterior sampling (arXiv 2405.13712, section 4).

    Args:
        covariance: The covariance :math:`V`. Tweedie's takes one vector-Jacobian product of the
            network per observed value or step of the solver; the closed forms take none.
        max_dense: The number of observed values per event up to which :math:`S` is built and
            solved as a matrix (default: 16 with Tweedie's covariance, else 1,024); beyond, it is
            solved by conjugate gradients without being built.
        rtol: The relative residual at which conjugate gradients stop.
        max_steps: The budget of conjugate gradients (default: twice the observed values).
    """

    covariance: PosteriorCovariance | TweedieCovariance = field(default=TweedieCovariance())
    max_dense: int | None = None
    rtol: float = 1e-5
    max_steps: int | None = None

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior, with a constant operator built once."""
        posterior = super().condition(denoiser, likelihood)
        if likelihood.linear and self._is_dense(likelihood):
            zeros = jnp.zeros((*likelihood.batch_shape, *denoiser.event_shape), denoiser.dtype)
            operator = likelihood.operator(zeros)
            return GuidedDenoiser(denoiser, likelihood, self, operator)
        return posterior

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        x_hat, local, pull = _linearize(posterior, x_t, sigma)
        dense = self._is_dense(posterior.likelihood)
        if isinstance(self.covariance, TweedieCovariance):
            solve = _solve_tweedie(local, pull) if dense else self._iterate_tweedie(local, pull)
        elif dense:
            operator = posterior.operator
            if operator is None:
                operator = posterior.likelihood.operator(x_hat)
            solve = _solve_closed(local, self.covariance(posterior.denoiser, sigma), operator)
        else:
            solve = self._iterate_closed(local, self.covariance(posterior.denoiser, sigma))
        correction = pull(solve.solution) if solve.correction is None else solve.correction
        return Guided(
            x_hat,
            x_hat + correction.reshape(x_hat.shape),
            gaussian_log_density(local.residual, solve.solution, solve.logdet),
            solve.residual,
            solve.num_truncated,
        )

    def _is_dense(self, likelihood: Likelihood) -> bool:
        limit = self.max_dense
        if limit is None:
            limit = 16 if isinstance(self.covariance, TweedieCovariance) else 1024
        return likelihood.num_observed <= limit

    def _iterate_tweedie(self, local: Linearization, pull: _Pull) -> "_Solve":
        return self._iterate(local, pull, floor=local.noise.matvec)

    def _iterate_closed(self, local: Linearization, cov: Covariance) -> "_Solve":
        solve = self._iterate(local, lambda u: cov.matvec(local.transpose(u)))
        return solve._replace(correction=None)

    def _iterate(self, local: Linearization, pull: _Pull, floor: _Pull | None = None) -> "_Solve":
        """Solve :math:`(N + A P) w = r`, for ``pull`` :math:`= P`."""
        solution, residual, _, correction = conjugate_gradient(
            lambda u, pulled: local.noise.matvec(u) + local.matvec(pulled),
            local.residual,
            inner=pull,
            rtol=self.rtol,
            max_steps=self.max_steps,
            floor=floor,
        )
        # Without S as a matrix its determinant is left out of the twist. With a closed form for V
        # and a linear mean it is the same for all particles of an event, and would cancel. In
        # general twists may be any positive function: particle samplers stay exact.
        zeros = jnp.zeros_like(residual)
        return _Solve(solution, zeros, residual, zeros.astype(int), correction)


@dataclass(frozen=True)
class PiGDM(Guidance):
    r"""Pseudoinverse guidance (Song et al., ICLR 2023), for noisy linear observations.

    MMPS with :math:`V = r^2 I`, :math:`r^2 = \sigma^2 s^2 / (\sigma^2 + s^2)`, where the paper has
    data of unit scale :math:`s`; its guidance enters through the score, at full weight.
    """

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior; see `MMPS.condition`."""
        return MMPS(UnitCovariance()).condition(denoiser, likelihood)

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        return MMPS(UnitCovariance()).guide(posterior, x_t, sigma)


@dataclass(frozen=True)
class TMPD(Guidance):
    r"""Tweedie moment projected diffusions (Boys et al., 2023, arXiv 2310.06721).

    :math:`A V A^T` is replaced by the diagonal of its row sums, :math:`A V A^T 1`, at one further
    vector-Jacobian product; negative sums are set to zero.
    """

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        x_hat, local, pull = _linearize(posterior, x_t, sigma)
        row_sums = local.matvec(pull(jnp.ones_like(local.residual)))
        noisy = Diagonal(local.noise.diagonal() + jnp.maximum(row_sums, 0))
        solution = noisy.solve(local.residual)
        return _direct(x_hat, pull(solution), local, solution, noisy.logdet())


@dataclass(frozen=True)
class DPS(Guidance):
    r"""Diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687).

    .. math:: E[x \mid x_t, y] \approx \hat x - \zeta \, s \,
        \nabla_{x_t} \lVert y - h(\hat x) \rVert

    The paper moves each step of its sampler by a multiple of this gradient. As a denoiser the
    multiple is per unit of :math:`\log \sigma`, so that it does not depend on the number of steps;
    the prior's scale :math:`s` stands for the unit scale of the paper's data (with :math:`y` in
    the units of :math:`x`).

    Args:
        strength: The factor :math:`\zeta`.
    """

    strength: float = 1.0

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        x_hat, local, pull = _linearize(posterior, x_t, sigma)
        norm = jnp.linalg.norm(local.residual, axis=-1, keepdims=True)
        tiny = jnp.finfo(norm.dtype).tiny
        gradient = pull(local.residual / jnp.maximum(norm, tiny)) / _align(sigma) ** 2
        shift = self.strength * posterior.denoiser.scale * gradient
        solution = local.noise.solve(local.residual)
        return _direct(x_hat, shift, local, solution, local.noise.logdet())


class _Solve(NamedTuple):
    """A solution of S w = r, and the correction where the solver has it already."""

    solution: jax.Array
    logdet: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    correction: jax.Array | None = None


def _linearize(
    posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, Linearization, _Pull]:
    r"""Return :math:`\hat x`, the likelihood there, and :math:`u \mapsto \sigma^2 J^T A^T u`."""
    x_hat, vjp = jax.vjp(lambda x: posterior.denoiser(x, sigma), x_t)
    local = posterior.likelihood.linearize(x_hat)
    variance = _align(sigma) ** 2

    def pull(u: jax.Array) -> jax.Array:
        v = local.transpose(u)
        return variance * vjp(v.reshape(x_hat.shape))[0].reshape(v.shape)

    return x_hat, local, pull


def _solve_tweedie(local: Linearization, pull: _Pull) -> _Solve:
    """Build A V A^T by one vector-Jacobian product per observed value, and truncate."""
    basis = jnp.eye(local.residual.shape[-1], dtype=local.residual.dtype)
    rows = jax.vmap(lambda e: pull(jnp.broadcast_to(e, local.residual.shape)))(basis)
    gain = jax.vmap(local.matvec, out_axes=-1)(rows)
    solution, logdet, num_truncated = truncated_solve(gain, local.noise, local.residual)
    correction = jnp.einsum("m...d,...m->...d", rows, solution)
    return _Solve(solution, logdet, jnp.zeros_like(logdet), num_truncated, correction)


def _solve_closed(local: Linearization, cov: Covariance, operator: jax.Array) -> _Solve:
    """Solve by one Cholesky factor for each matrix, shared by leading axes of the residual.

    With little noise a smooth prior's matrix is singular to rounding at high noise levels, where
    nothing rests on the digits lost: its diagonal then gets the least that rounding asks for.
    """

    def solve(gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _cholesky_solve(gain + local.noise.dense(), local.residual)

    gain = _gain(cov, operator)
    solution, logdet = solve(gain)
    failed = jnp.isnan(logdet)
    trace = jnp.trace(gain, axis1=-2, axis2=-1) + local.noise.trace()
    jitter = jnp.where(failed, jnp.finfo(gain.dtype).eps * trace, 0)
    identity = jnp.eye(gain.shape[-1], dtype=gain.dtype)
    # The condition is on solutions: where it returned the factors, it would copy them.
    solution, logdet = jax.lax.cond(
        failed.any(),
        lambda: solve(gain + jitter[..., None, None] * identity),
        lambda: (solution, logdet),
    )
    # What the jitter leaves is all there is, but for rounding.
    norm, error = (jnp.linalg.norm(v, axis=-1) for v in (local.residual, solution))
    residual = jitter * error / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    logdet = jnp.broadcast_to(logdet, residual.shape)
    return _Solve(solution, logdet, residual, jnp.zeros(residual.shape, int))


def _gain(cov: Covariance, operator: jax.Array) -> jax.Array:
    """Return A V A^T, without matrix products where A is diagonal: a mask, say."""
    if operator.shape[-2] != operator.shape[-1]:
        return cov.sandwich(operator)
    diagonal = jnp.diagonal(operator, axis1=-2, axis2=-1)
    off_diagonal = ~jnp.eye(operator.shape[-1], dtype=bool)
    return jax.lax.cond(
        (operator * off_diagonal).any(),
        lambda: cov.sandwich(operator),
        lambda: diagonal[..., :, None] * cov.dense() * diagonal[..., None, :],
    )


def _cholesky_solve(matrix: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solve, and return the log-determinant; leading axes that only ``b`` has share a factor."""

    def solve(matrix: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
        return jax.scipy.linalg.cho_solve((factor, True), columns), logdet

    extra = b.shape[: b.ndim - matrix.ndim + 1]
    columns = jnp.moveaxis(b.reshape(-1, *b.shape[len(extra) :]), 0, -1)
    matrix = jnp.broadcast_to(matrix, (*columns.shape[:-2], *matrix.shape[-2:]))
    solution, logdet = by_matrix(solve, matrix, columns)
    return jnp.moveaxis(solution, -1, 0).reshape(b.shape), logdet


def _direct(
    x_hat: jax.Array,
    correction: jax.Array,
    local: Linearization,
    solution: jax.Array,
    logdet: jax.Array,
) -> Guided:
    """Guide by a correction that took no solver."""
    log_twist = gaussian_log_density(local.residual, solution, logdet)
    zeros = jnp.zeros_like(log_twist)
    x_hat_y = x_hat + correction.reshape(x_hat.shape)
    return Guided(x_hat, x_hat_y, log_twist, zeros, zeros.astype(int))


def _align(sigma: jax.Array) -> jax.Array:
    """Give noise levels of a batch an axis that broadcasts against flattened events."""
    return sigma[..., None] if sigma.ndim else sigma
