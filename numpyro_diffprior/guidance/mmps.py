r"""Moment matching posterior sampling (MMPS), the guidance of this package.

It approximates :math:`p(x \mid x_t)` by a Gaussian with covariance :math:`V`, so that with a mean
:math:`h`, linearised to :math:`A` at :math:`\hat x`,

.. math:: p(y \mid x_t) \approx \mathcal{N}(y; h(\hat x), S), \quad S = \Sigma_y + A V A^T, \quad
    E[x \mid x_t, y] \approx \hat x + \sigma^2 J^T A^T S^{-1} (y - h(\hat x)),

where :math:`J = \partial D / \partial x_t` enters by one vector-Jacobian product. It is exact for
Gaussian priors with linear observations when :math:`V` is the conditional covariance.

The solve is made for each event alone: no inner product runs over the batch.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712, section 4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_count, check_number, set_numbers
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import PosteriorCovariance, TweedieCovariance
from numpyro_diffprior.guidance.guidance import (
    Guidance,
    Guided,
    GuidedDenoiser,
    Outlook,
    pull_back,
)
from numpyro_diffprior.guidance.likelihood import Likelihood, Linearization, gaussian_log_density
from numpyro_diffprior.linalg.batched import einsum
from numpyro_diffprior.linalg.covariances import Covariance
from numpyro_diffprior.linalg.solvers import (
    conjugate_gradient,
    factored_solve,
    sandwich,
    sandwich_square,
    truncated_solve,
)

__all__ = ["MMPS"]

_Pull = Callable[[jax.Array], jax.Array]


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
        look_ahead: Whether particles look ahead where they can, with a closed form for :math:`V`
            and dense solves of a linear mean, rather than being guided; see
            `numpyro_diffprior.particles.proposals`.
        num_iterations: The number of damped Gauss-Newton steps at each noise level where the mean
            bends or noise depends on :math:`x`; one linearises once, as the paper does.
    """

    covariance: PosteriorCovariance | TweedieCovariance = field(default=TweedieCovariance())
    max_dense: int | None = None
    rtol: float = 1e-5
    max_steps: int | None = None
    look_ahead: bool = False
    num_iterations: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.covariance, PosteriorCovariance | TweedieCovariance):
            raise ValueError(
                f"MMPS: expected a posterior covariance, got {self.covariance!r}; pass an object "
                "such as GaussianCovariance()."
            )
        set_numbers(
            self,
            rtol=check_number("MMPS", "rtol", self.rtol),
            num_iterations=check_count("MMPS", "num_iterations", self.num_iterations),
        )
        if self.max_dense is not None:
            set_numbers(self, max_dense=check_count("MMPS", "max_dense", self.max_dense, 0))
        if self.max_steps is not None:
            set_numbers(self, max_steps=check_count("MMPS", "max_steps", self.max_steps))

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
        x_hat, pull = pull_back(posterior, x_t, sigma)
        cov = None
        if not isinstance(self.covariance, TweedieCovariance):
            cov = self.covariance(posterior.denoiser, sigma)
        if not posterior.likelihood.linear:
            return self._guide_by_newton(posterior, x_hat, pull, cov)
        local = posterior.likelihood.linearize(x_hat)
        solve = self._solve(posterior, x_hat, local, pull, cov)
        correction = solve.correction
        if correction is None:
            correction = pull(local.transpose(solve.solution))
        return Guided(
            x_hat,
            x_hat + correction.reshape(x_hat.shape),
            gaussian_log_density(local.residual, solve.solution, solve.logdet)
            - solve.left_out / 2,
            solve.residual,
            solve.num_truncated,
        )

    def _guide_by_newton(
        self, posterior: GuidedDenoiser, x_hat: jax.Array, pull: _Pull, cov: Covariance | None
    ) -> Guided:
        r"""Guide to the mode of :math:`p(y \mid x) \mathcal{N}(x; \hat x, V)`.

        A mode :math:`\hat x + V b` has :math:`b = \nabla_x \log p(y \mid x)`, and the guidance is
        :math:`\sigma^2 J^T b`. Damped Gauss-Newton steps look for it.
        """
        likelihood = posterior.likelihood
        dense = self._is_dense(likelihood)

        def step(state: _Newton, _: None) -> tuple[_Newton, None]:
            x = x_hat + state.shift.reshape(x_hat.shape)
            local = likelihood.linearize(x)
            local = local._replace(residual=local.residual + local.matvec(state.shift))
            solve = self._solve(posterior, x, local, pull, cov)
            b = local.transpose(solve.solution)
            shift = solve.correction if cov is None else cov.matvec(b)
            assert shift is not None
            moved = _search(likelihood, x_hat, state, shift, b)
            # Matrix-free solves have no determinant, see `_iterate`.
            excess = solve.logdet - local.noise.logdet() if dense else 0
            return _Newton(
                *moved,
                moved.log_joint - excess / 2,
                jnp.maximum(state.residual, solve.residual),
                jnp.maximum(state.num_truncated, solve.num_truncated),
            ), None

        zeros = jnp.zeros(x_hat.shape[: x_hat.ndim - len(posterior.event_shape)], x_hat.dtype)
        origin = jnp.zeros((*zeros.shape, posterior.event_size), x_hat.dtype)
        start = _Newton(origin, origin, zeros, zeros, zeros, zeros.astype(int))
        state, _ = jax.lax.scan(step, start, length=self.num_iterations)
        correction = state.shift if cov is None else pull(state.b)
        return Guided(
            x_hat,
            x_hat + correction.reshape(x_hat.shape),
            state.log_twist,
            state.residual,
            state.num_truncated,
        )

    def _solve(
        self,
        posterior: GuidedDenoiser,
        x: jax.Array,
        local: Linearization,
        pull: _Pull,
        cov: Covariance | None,
    ) -> "_Solve":
        """Solve S w = r at ``x``, with a closed form for V or, without one, with Tweedie's."""
        dense = self._is_dense(posterior.likelihood)
        if cov is None:

            def pulled(u: jax.Array) -> jax.Array:
                return pull(local.transpose(u))

            if dense:
                return _solve_tweedie(local, pulled)
            return self._iterate(local, pulled, floor=local.noise.matvec)
        if dense:
            operator = posterior.operator
            if operator is None:
                operator = posterior.likelihood.operator(x)
            factored = factored_solve(sandwich(cov, operator), local.noise, local.residual)
            no_directions = jnp.zeros(factored.residual.shape, int)
            return _Solve(factored.solution, factored.logdet, factored.residual, no_directions)
        solve = self._iterate(local, lambda u: cov.matvec(local.transpose(u)))
        return solve._replace(correction=None)

    @property
    def looks_ahead(self) -> bool:
        """Whether particles are to look ahead, and the covariance has a closed form."""
        return self.look_ahead and not isinstance(self.covariance, TweedieCovariance)

    def outlook(self, posterior: GuidedDenoiser, x: jax.Array, sigma: jax.Array) -> Outlook:
        """Return the outlook of a Gaussian prior with the covariance; see `Outlook`."""
        assert posterior.operator is not None
        assert not isinstance(self.covariance, TweedieCovariance)
        local = posterior.likelihood.linearize(x)
        cov, operator = self.covariance(posterior.denoiser, sigma), posterior.operator
        variance = sigma**2
        return Outlook(
            local.residual,
            lambda v: local.matvec(cov.matvec(v)) / variance,
            lambda u: cov.matvec(local.transpose(u)) / variance,
            sandwich(cov, operator) + local.noise.dense(),
            sandwich_square(cov, operator) / variance**2,
            posterior.event_size,
        )

    def _is_dense(self, likelihood: Likelihood) -> bool:
        limit = self.max_dense
        if limit is None:
            limit = 16 if isinstance(self.covariance, TweedieCovariance) else 1024
        return likelihood.num_observed <= limit

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
        # Where it stopped early, the rest is taken for noise.
        assert correction is not None
        rest = local.residual - local.noise.matvec(solution) - local.matvec(correction)
        left_out = jnp.sum(rest * local.noise.solve(rest), axis=-1)
        return _Solve(solution, zeros, residual, zeros.astype(int), correction, left_out)


class _Solve(NamedTuple):
    """A solution of S w = r, and the correction where the solver has it already."""

    solution: jax.Array
    logdet: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    correction: jax.Array | None = None
    left_out: jax.Array | float = 0.0  # what r^T w lacks, in directions without correction


class _Newton(NamedTuple):
    r"""Where the search for the mode :math:`\hat x + V b` is.

    Attributes:
        shift: :math:`V b`, with shape ``(*batch, d)``.
        b: As it says, likewise.
        log_joint: :math:`\log p(y \mid x) - b^T V b / 2`, with shape ``(*batch,)``.
        log_twist: Laplace's approximation of :math:`\log p(y \mid x_t)`, likewise.
        residual: The largest relative residual of the solves, likewise.
        num_truncated: The largest number of truncated directions, likewise.
    """

    shift: jax.Array
    b: jax.Array
    log_joint: jax.Array
    log_twist: jax.Array
    residual: jax.Array
    num_truncated: jax.Array


class _Moved(NamedTuple):
    """The first three of `_Newton`."""

    shift: jax.Array
    b: jax.Array
    log_joint: jax.Array


def _search(
    likelihood: Likelihood, x_hat: jax.Array, state: _Newton, shift: jax.Array, b: jax.Array
) -> _Moved:
    """Go to where the log-density is largest on the way to the next point."""

    def at(length: jax.Array) -> _Moved:
        moved = state.shift + length * (shift - state.shift)
        b_moved = state.b + length * (b - state.b)
        log_likelihood = likelihood.log_prob(x_hat + moved.reshape(x_hat.shape))
        log_joint = log_likelihood - 0.5 * jnp.sum(moved * b_moved, axis=-1)
        return _Moved(moved, b_moved, jnp.where(jnp.isnan(log_joint), -jnp.inf, log_joint))

    lengths = 0.5 ** jnp.arange(_NUM_LENGTHS)
    best = jnp.argmax(jax.lax.map(lambda length: at(length).log_joint, lengths), axis=0)
    return at(lengths[best][..., None])


_NUM_LENGTHS = 8


def _solve_tweedie(local: Linearization, pull: _Pull) -> _Solve:
    """Build A V A^T by one vector-Jacobian product per observed value, and truncate."""
    basis = jnp.eye(local.residual.shape[-1], dtype=local.residual.dtype)
    rows = jax.vmap(lambda e: pull(jnp.broadcast_to(e, local.residual.shape)))(basis)
    gain = jax.vmap(local.matvec, out_axes=-1)(rows)
    solve = truncated_solve(gain, local.noise, local.residual)
    correction = einsum("m...d,...m->...d", rows, solve.solution)
    return _Solve(
        solve.solution,
        solve.logdet,
        jnp.zeros_like(solve.logdet),
        solve.num_truncated,
        correction,
        solve.left_out,
    )
