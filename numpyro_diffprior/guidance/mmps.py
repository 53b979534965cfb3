r"""Moment matching posterior sampling (MMPS), the guidance of this package.

It approximates :math:`p(x \mid x_t)` by a Gaussian with covariance :math:`V`, so that with a mean
:math:`h`, linearized to :math:`A` at :math:`\hat x`,

.. math:: p(y \mid x_t) \approx \mathcal{N}(y; h(\hat x), S), \quad
    S = \Sigma_y + A V A^T, \quad
    E[x \mid x_t, y] \approx \hat x + \sigma^2 J^T A^T S^{-1} (y - h(\hat x)),

where :math:`J = \partial D / \partial x_t` enters by one vector-Jacobian product. It is exact for
Gaussian priors with linear observations when :math:`V` is the conditional covariance.

A nonlinear likelihood is expanded at the mode of
:math:`p(y \mid x) \, \mathcal{N}(x; \hat x, V)`, found by damped Gauss-Newton steps. The twist is
Laplace's approximation there, which for a linear Gaussian likelihood equals the Gaussian above:
with the mode :math:`\hat x + V b` and the likelihood's precision :math:`\Lambda`,

.. math:: \log p(y \mid x_t) \approx \log p(y \mid \hat x + V b) - \tfrac{1}{2} b^T V b
    - \tfrac{1}{2} \log \det (I + \Lambda V).

Each event is solved on its own: no inner product runs over the batch.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712, section 4.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_count, check_number, set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import (
    PosteriorCovariance,
    Product,
    TweedieCovariance,
)
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.look_ahead import LookAhead
from numpyro_diffprior.guidance.solves import (
    ConjugateGradients,
    EigenSolve,
    ElementwiseSolve,
    FactoredSolve,
    Solve,
    StationarySolve,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

__all__ = ["MMPS"]

_LOGGER = logging.getLogger(__name__)


@jax.tree_util.register_static
@dataclass(frozen=True)
class MMPS(Guidance):
    r"""Moment matching posterior sampling (arXiv 2405.13712, section 4).

    Args:
        covariance: The covariance :math:`V`. Tweedie's takes one vector-Jacobian product of the
            network per observed value or step of the solver; the closed forms take none.
        max_dense: The number of observed values per event up to which :math:`S` is built and
            solved as a matrix (default: 16 with Tweedie's covariance, 1,024 if ``look_ahead``,
            otherwise 128); beyond, conjugate gradients solve without it, which cannot be
            differentiated in reverse mode. Diagonal and low-rank covariances need no matrix for
            likelihoods that are elementwise, at any number of values. Under stationary
            covariances, k-space and periodic convolutions take one step, beyond that number.
        atol: The error at which conjugate gradients stop, in deviations of the posterior at a
            noise level: no linear function of the event is off by more, unless ``max_steps`` ends
            them before. A bound with a closed form for :math:`V` and log-densities that are
            concave, an estimate otherwise.
        max_steps: The maximum number of steps of conjugate gradients (default: 3 with Tweedie's
            covariance, whose steps are vector-Jacobian products of the network; otherwise as
            `ConjugateGradients`). The remaining relative residual is reported in the statistics
            of draws, as ``residual``.
        look_ahead: Whether particle proposals look ahead instead of being guided; see
            `numpyro_diffprior.particles.proposals`. Proposals only look ahead with a closed form
            for :math:`V`, a linear mean and direct solves; they are guided otherwise.
        num_iterations: The number of damped Gauss-Newton steps at each noise level for a
            nonlinear likelihood; one is the linearization of the paper.
    """

    covariance: PosteriorCovariance = field(default=TweedieCovariance())
    max_dense: int | None = None
    atol: float = 0.1
    max_steps: int | None = None
    look_ahead: bool = False
    num_iterations: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.covariance, PosteriorCovariance):
            raise ValueError(
                f"MMPS: expected a posterior covariance, got {self.covariance!r}; pass an object "
                "such as GaussianCovariance()."
            )
        set_fields(
            self,
            atol=check_number("MMPS", "atol", self.atol),
            num_iterations=check_count("MMPS", "num_iterations", self.num_iterations),
        )
        if self.max_dense is not None:
            set_fields(self, max_dense=check_count("MMPS", "max_dense", self.max_dense, 0))
        if self.max_steps is not None:
            set_fields(self, max_steps=check_count("MMPS", "max_steps", self.max_steps))

    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior; what a linear mean has constant is built once."""
        solve = self.choose_solve(denoiser, likelihood)
        _LOGGER.info(
            "MMPS with %s: %d observed values per event (%s, %s) are solved by %s.",
            type(self.covariance).__name__,
            likelihood.num_observed,
            "linear" if likelihood.linear else "nonlinear",
            "elementwise" if likelihood.elementwise else "not elementwise",
            type(solve).__name__,
        )
        return _Posterior(denoiser, likelihood, self, solve)

    def choose_solve(self, denoiser: Denoiser, likelihood: Likelihood) -> Solve:
        """Return the solver that fits the structure of covariance and likelihood."""
        zeros = jnp.zeros((*likelihood.batch_shape, *denoiser.event_shape), denoiser.dtype)
        cov = self.covariance.closed_form(denoiser, jnp.ones((), denoiser.dtype))
        if likelihood.elementwise and cov is not None and not cov.has_dense_update:
            if not likelihood.linear:
                return ElementwiseSolve()
            local = likelihood.linearize(zeros)
            return ElementwiseSolve(local.precision(jnp.ones_like(local.score())))
        limit = self.max_dense
        if limit is None:
            limit = 16 if cov is None else 1024 if self.look_ahead else 128
        if likelihood.num_observed > limit or likelihood.potential is not None:
            max_steps = self.max_steps
            if max_steps is None and cov is None:
                max_steps = 3
            solve = ConjugateGradients(self.atol, max_steps)
            is_quadratic = likelihood.linear and likelihood.potential is None
            if (
                is_quadratic
                and not likelihood.elementwise
                and isinstance(cov, Stationary | StationaryPlusLowRank)
            ):
                largest = self.covariance.closed_form(denoiser, denoiser.sigma_max)
                assert isinstance(largest, Stationary | StationaryPlusLowRank)
                return StationarySolve.of(likelihood.linearize(zeros), largest, solve)
            return solve
        if cov is None:
            return EigenSolve()
        if not likelihood.linear:
            return FactoredSolve()
        return FactoredSolve.of(likelihood.operator(zeros), likelihood.linearize(zeros).noise)


class _Mode(NamedTuple):
    r"""A candidate for the mode :math:`\hat x + V b`."""

    shift: jax.Array  # V b, (*batch, d)
    b: jax.Array  # the gradient of the log-likelihood there, (*batch, d)
    log_joint: jax.Array  # log p(y | x) - b^T V b / 2, (*batch,)


@dataclass(frozen=True, eq=False)
class _Posterior(GuidedDenoiser):
    """The denoiser of a posterior under `MMPS`."""

    guidance: MMPS
    solve: Solve

    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
        cov = self.guidance.covariance.at(self.prior, x_t, sigma)
        x_hat = cov.x_hat
        batch_shape = x_hat.shape[: x_hat.ndim - len(self.event_shape)]
        origin = jnp.zeros((*batch_shape, self.event_size), x_hat.dtype)
        start = _Mode(origin, origin, jnp.zeros(batch_shape, x_hat.dtype))
        first = None if guess is None else (guess - x_hat).reshape(origin.shape)

        def step(
            state: tuple[_Mode, jax.Array | None], _: None
        ) -> tuple[tuple[_Mode, jax.Array], tuple[jax.Array, SolveStats]]:
            mode, shift = state
            x = x_hat + mode.shift.reshape(x_hat.shape)
            local = self.likelihood.linearize(x).recenter(mode.shift)
            solution = self.solve(local, cov, partial(self.likelihood.operator, x), shift)
            if self.likelihood.linear:
                mode = self._at(x_hat, solution.shift, solution.b)
            else:
                mode = self._search(x_hat, mode, solution.shift, solution.b)
            return (mode, mode.shift), (solution.logdet, solution.stats)

        if self.likelihood.linear:
            (mode, _), (logdet, stats) = step((start, first), None)
        else:
            (mode, _), (logdets, all_stats) = jax.lax.scan(
                step,
                (start, origin if first is None else first),
                length=self.guidance.num_iterations,
            )
            logdet, stats = logdets[-1], all_stats.over_path()
        correction = mode.shift
        if cov.closed_form is not None:
            correction = self._pull(x_hat, mode, cov.pull)
        return Guided(
            x_hat=x_hat,
            x_hat_y=x_hat + correction.reshape(x_hat.shape),
            log_twist=mode.log_joint - logdet / 2,
            stats=stats,
        )

    @property
    def looks_ahead(self) -> bool:
        return self.guidance.look_ahead and self.solve.looks_ahead

    def look_ahead(self, x: jax.Array, sigma: jax.Array, tau: jax.Array) -> LookAhead:
        cov = self.guidance.covariance.closed_form(self.prior, sigma)
        assert cov is not None
        return self.solve.look_ahead(self.likelihood.linearize(x), cov, sigma, tau)

    def _pull(self, x_hat: jax.Array, mode: _Mode, pull: Product) -> jax.Array:
        r"""Return the correction :math:`u = \sigma^2 J^T b`, or less of it where it overshoots.

        The denoiser's own Jacobian is more accurate than a closed form :math:`V`. But if :math:`V`
        is much too small, :math:`u` is much larger than :math:`v = V b`, and the steps of a
        sampler diverge. The energy
        :math:`\tfrac{1}{2} \delta^T (V^{-1} + \Lambda) \delta - s^T \delta` is least at
        :math:`v`, where it is :math:`-\tfrac{1}{2} s^T v`. From there to
        :math:`v + \alpha (u - v)` the likelihood's part of it rises by
        :math:`\tfrac{1}{2} \alpha^2 q` with :math:`q = (u - v)^T \Lambda (u - v)`: by no more
        than :math:`v` gains, with :math:`\alpha = \min(1, s^T v / q)`.
        """
        x = x_hat if self.likelihood.linear else x_hat + mode.shift.reshape(x_hat.shape)
        local = self.likelihood.linearize(x)
        if not self.likelihood.linear:
            local = local.recenter(mode.shift)
        correction = pull(mode.b)
        difference = correction - mode.shift
        rise = _dot(difference, local.precision(difference))
        gain = jnp.maximum(_dot(local.score(), mode.shift), 0)
        part = gain / jnp.where(rise > gain, rise, 1)
        shortened = mode.shift + part[..., None] * difference
        return jnp.where((rise > gain)[..., None], shortened, correction)

    def _at(self, x_hat: jax.Array, shift: jax.Array, b: jax.Array) -> _Mode:
        log_likelihood = self.likelihood.log_prob(x_hat + shift.reshape(x_hat.shape))
        log_joint = log_likelihood - 0.5 * _dot(shift, b)
        return _Mode(shift, b, log_joint)

    def _search(self, x_hat: jax.Array, mode: _Mode, shift: jax.Array, b: jax.Array) -> _Mode:
        """Return the point of largest log-density on the line from ``mode`` to the next one."""

        def at(length: jax.Array) -> _Mode:
            candidate = self._at(
                x_hat, mode.shift + length * (shift - mode.shift), mode.b + length * (b - mode.b)
            )
            log_joint = jnp.where(jnp.isnan(candidate.log_joint), -jnp.inf, candidate.log_joint)
            return candidate._replace(log_joint=log_joint)

        lengths = 0.5 ** jnp.arange(_NUM_LENGTHS)
        best = jnp.argmax(jax.lax.map(lambda length: at(length).log_joint, lengths), axis=0)
        return at(lengths[best][..., None])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1)


_NUM_LENGTHS = 8
