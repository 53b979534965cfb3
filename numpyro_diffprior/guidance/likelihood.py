r"""The likelihood of a batch of events, with the derivatives that guidance needs.

Guidance uses the first two moments of the observed values given events ``x``,

.. math:: y \approx \mathcal{N}(h(x), \Sigma_y(x)), \quad
    h(x + v) \approx h(x) + A v, \quad A = \partial h / \partial x,

and particle samplers use the exact log-density for their weights. If a distribution has no
moments to match, :math:`h(x)` are its parameters and :math:`y` is a pseudo-observation of them,
with the inverse curvature of the log-density as noise; both depend on :math:`x`. A
*potential* is a log-density of the event itself, used through its gradient :math:`g` and products
with its negative Hessian :math:`H`. This module does not depend on NumPyro:
`numpyro_diffprior.reading` makes a likelihood from a model.

Shapes: ``x`` is ``(*extra, *batch, *event)``, where ``batch`` are the observed events (a plate)
and ``extra`` the draws or particles of each. All observed values of an event form one vector of
length ``m``; masked values have a zero row in :math:`A`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import flatten_events
from numpyro_diffprior.linalg.batched import apply, magnitude, probe
from numpyro_diffprior.linalg.covariances import Covariance

__all__ = ["Likelihood", "Linearization", "ObservationMoments", "linear_gaussian"]


class ObservationMoments(NamedTuple):
    """The moments of the observations given a batch of events, and the observed values.

    Attributes:
        y_hat: The expected values, with shape ``(*batch, m)``.
        noise: The covariance of the observed values given ``x``, of size ``m``.
        y: The observed values, or pseudo-observations at ``x``, with shape ``(*batch, m)``.
        squares: The squared residuals in units of their variance, with shape ``(*batch, m)``;
            None if they are those of ``y - y_hat``.
    """

    y_hat: jax.Array
    noise: Covariance
    y: jax.Array
    squares: jax.Array | None = None

    def squared_residuals(self) -> jax.Array:
        r"""Return ``squares`` or, by default, :math:`r_i (\Sigma_y^{-1} r)_i`."""
        if self.squares is not None:
            return self.squares
        residual = self.y - self.y_hat
        return residual * self.noise.solve(residual)


class Linearization(NamedTuple):
    r"""The second-order approximation of a likelihood around given events.

    Attributes:
        residual: Observed minus expected values, with shape ``(*batch, m)``.
        matvec: The operator :math:`A`, from ``(*batch, d)`` to ``(*batch, m)``.
        transpose: Its transpose, from ``(*batch, m)`` to ``(*batch, d)``.
        noise: The covariance of the observed values given ``x``, of size ``m``.
        gradient: The gradient of the potential, with shape ``(*batch, d)``, or None.
        curvature: The product with :math:`H`, the potential's negative Hessian, or None.
    """

    residual: jax.Array
    matvec: Callable[[jax.Array], jax.Array]
    transpose: Callable[[jax.Array], jax.Array]
    noise: Covariance
    gradient: jax.Array | None = None
    curvature: Callable[[jax.Array], jax.Array] | None = None

    def score(self) -> jax.Array:
        r"""Return :math:`A^T \Sigma_y^{-1} r + g`, with shape ``(*batch, d)``."""
        score = self.transpose(self.noise.solve(self.residual))
        return score if self.gradient is None else score + self.gradient

    def precision(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`(A^T \Sigma_y^{-1} A + H) v` for flattened events."""
        product = self.transpose(self.noise.solve(self.matvec(v)))
        return product if self.curvature is None else product + self.curvature(v)

    def white_matvec(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`R v` for flattened events, where :math:`R^T R = A^T \Sigma_y^{-1} A`."""
        return self.noise.whiten(self.matvec(v))

    def white_transpose(self, u: jax.Array) -> jax.Array:
        r"""Return :math:`R^T u`; see `white_matvec`."""
        return self.transpose(self.noise.solve(self.noise.sqrt_matvec(u)))

    def recenter(self, shift: jax.Array) -> "Linearization":
        """Return the same approximation, expanded around the events minus ``shift``."""
        residual = self.residual + self.matvec(shift)
        if self.gradient is None or self.curvature is None:
            return self._replace(residual=residual)
        gradient = self.gradient + self.curvature(shift)
        return self._replace(residual=residual, gradient=gradient)


@dataclass(frozen=True, eq=False)
class Likelihood:
    r"""The likelihood of a batch of independent events.

    Args:
        y: Observed values, with shape ``(*batch, m)``; zero where masked. Pseudo-observations
            are evaluated at the prior's mean.
        read: Maps ``x`` to the moments of the observations and the values observed there.
        log_prob: Maps ``x`` to its exact log-likelihood, with shape ``(*extra, *batch)``.
        event_shape: The shape of one event.
        elementwise: Whether each mean depends on one element of the event at most, and the noise
            of different values is independent, so that :math:`A^T \Sigma_y^{-1} A` is diagonal.
        linear: Whether the mean is affine in ``x``, covariance and ``y`` do not depend on it, and
            there is no potential. Draws and particles of an event then share the operator and
            the solves.
        has_residual: Which values have a residual, which masked values do not: booleans with
            shape ``(*batch, m)`` (default: all).
        potential: Maps ``x`` to the terms of the log-likelihood that ``read`` leaves out, with
            shape ``(*extra, *batch)``, or None. Guidance uses its gradient and curvature.
    """

    y: jax.Array
    read: Callable[[jax.Array], ObservationMoments]
    log_prob: Callable[[jax.Array], jax.Array]
    event_shape: tuple[int, ...]
    elementwise: bool = False
    linear: bool = False
    has_residual: jax.Array | None = None
    potential: Callable[[jax.Array], jax.Array] | None = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of observed events."""
        return self.y.shape[:-1]

    @property
    def num_observed(self) -> int:
        """The number of observed values of one event, including masked ones."""
        return self.y.shape[-1]

    @property
    def num_residuals(self) -> jax.Array:
        """The number of residuals of each event, with shape ``(*batch,)``."""
        if self.has_residual is None:
            return jnp.full(self.batch_shape, self.num_observed)
        return self.has_residual.sum(-1)

    def reduced_chi_square(self, x: jax.Array) -> jax.Array:
        r"""Return the reduced chi-square of the residuals, :math:`r^T \Sigma_y^{-1} r / m`.

        For Gaussian noise and data that were simulated from the model, :math:`m` times it follows
        :math:`\chi^2_m` for exact posterior draws: event and data are then a joint draw.

        Args:
            x: Events, with shape ``(*extra, *batch, *event)``.

        Returns:
            An array with shape ``(*extra, *batch)``; NaN where no value has a residual, as for
            masked values and ``numpyro.factor``.
        """
        squares = self.read(x).squared_residuals()
        if self.has_residual is not None:
            squares = jnp.where(self.has_residual, squares, 0)
        return squares.sum(-1) / self.num_residuals

    def linearize(self, x: jax.Array) -> Linearization:
        """Linearize the mean at ``x``, and expand the potential to second order."""

        def split(x: jax.Array) -> tuple[jax.Array, tuple[Covariance, jax.Array]]:
            moments = self.read(x)
            return moments.y_hat, (moments.noise, moments.y)

        y_hat, tangent, (noise, y) = jax.linearize(split, x, has_aux=True)
        transposed = jax.linear_transpose(tangent, x)
        flat_shape = (*x.shape[: x.ndim - len(self.event_shape)], prod(self.event_shape))

        def matvec(v: jax.Array) -> jax.Array:
            return tangent(v.reshape(x.shape))

        def transpose(u: jax.Array) -> jax.Array:
            return transposed(u)[0].reshape(flat_shape)

        local = Linearization(y - y_hat, matvec, transpose, noise)
        if self.potential is None:
            return local
        potential = self.potential
        gradient, second = jax.linearize(jax.grad(lambda x: potential(x).sum()), x)

        def curvature(v: jax.Array) -> jax.Array:
            return -second(v.reshape(x.shape)).reshape(flat_shape)

        return local._replace(gradient=gradient.reshape(flat_shape), curvature=curvature)

    def largest_precision(self, x: jax.Array) -> jax.Array:
        r"""Return the largest precision of the likelihood in any direction, a scalar.

        This is the largest eigenvalue of :math:`A^T \Sigma_y^{-1} A + H` over all events,
        estimated by a few power iterations.

        Args:
            x: A batch of events, with shape ``(*batch, *event)``.
        """
        local = self.linearize(x)

        def step(_: int, v: jax.Array) -> jax.Array:
            w = local.precision(v)
            return w / magnitude(w, axis=-1)

        start = probe(prod(self.event_shape), x.dtype)
        v = jnp.broadcast_to(start / magnitude(start), (*self.batch_shape, *start.shape))
        v = jax.lax.fori_loop(0, 4, step, v)
        return jnp.nanmax(jnp.abs(local.precision(v)).max(-1))

    def operator(self, x: jax.Array) -> jax.Array:
        """Return :math:`A` at ``x`` as matrices, with shape ``(*batch, m, d)``."""
        local, size = self.linearize(x), prod(self.event_shape)
        product, axis = local.matvec, -1  # by columns, or by rows if there are fewer
        if size > self.num_observed:
            product, size, axis = local.transpose, self.num_observed, -2
        shape = (*local.residual.shape[:-1], size)
        vectors = jax.vmap(lambda e: product(jnp.broadcast_to(e, shape)), out_axes=axis)
        return vectors(jnp.eye(size, dtype=x.dtype))


def linear_gaussian(
    y: jax.Array, matrix: jax.Array, noise: Covariance, event_shape: tuple[int, ...]
) -> Likelihood:
    r"""Return the likelihood of :math:`y \sim \mathcal{N}(A x, \Sigma_y)`.

    Args:
        y: Observed values, with shape ``(*batch, m)``.
        matrix: The operator on flattened events, with shape ``(*batch, m, d)`` or ``(m, d)``.
        noise: The covariance of the noise, of size ``m``.
        event_shape: The shape of one event, of ``d`` elements.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if matrix.shape[-2:] != (y.shape[-1], prod(event_shape)) or noise.size != y.shape[-1]:
        raise ValueError(
            f"linear_gaussian: y of shape {y.shape} and events of shape {event_shape} need a "
            f"matrix of shape (..., {y.shape[-1]}, {prod(event_shape)}) and noise of size "
            f"{y.shape[-1]}; got {matrix.shape} and {noise.size}."
        )

    def read(x: jax.Array) -> ObservationMoments:
        return ObservationMoments(apply(matrix, flatten_events(x, event_shape)), noise, y)

    def log_prob(x: jax.Array) -> jax.Array:
        residual = y - read(x).y_hat
        return gaussian_log_density(residual, noise.solve(residual), noise.logdet())

    return Likelihood(y, read, log_prob, event_shape, linear=True)


def gaussian_log_density(residual: jax.Array, solution: jax.Array, logdet: jax.Array) -> jax.Array:
    r"""Return :math:`\log \mathcal{N}(r; 0, S)` from :math:`r`, :math:`S^{-1} r` and log det S."""
    size = residual.shape[-1]
    return -0.5 * (jnp.sum(residual * solution, axis=-1) + logdet + size * jnp.log(2 * jnp.pi))
