r"""The probability flow ODE: log-densities of events, and the noise that generates them.

Deterministic samplers (`numpyro_diffprior.diffusion.samplers`) solve, from high to low noise,

.. math:: \frac{dx}{d \log \sigma} = x - D(x, \sigma).

This module solves it from low to high noise by an adaptive solver, up to the initial Gaussian of
the samplers, :math:`x_T \sim \mathcal{N}(\mu, \Sigma + \sigma_{max}^2 I)`.

References:
    Song et al., *Score-based generative modeling through SDEs*, ICLR 2021, arXiv 2011.13456.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from numpyro_diffprior.denoisers.denoiser import Denoiser

__all__ = ["flow_log_prob", "flow_noise"]


def flow_log_prob(
    denoiser: Denoiser,
    x: jax.Array,
    *,
    num_probes: int | None = None,
    rtol: float = 1e-5,
    max_steps: int = 256,
) -> jax.Array:
    r"""Return the log-density of events by the probability flow.

    .. math:: \frac{dx}{d \log \sigma} = x - D(x, \sigma), \quad
        \log p(x) = \log p(x_T) + \int_{\log \sigma_{min}}^{\log \sigma_{max}}
        \nabla \cdot (x - D(x, \sigma)) \, d \log \sigma

    (Song et al. 2021, equation 39), where :math:`p(x_T)` is the initial Gaussian of the samplers.
    This is the density of the prior smoothed by noise of level :math:`\sigma_{min}`, and it is
    differentiable. The ODE is solved for :math:`z = (x - \mu) / \sqrt{s^2 + \sigma^2}`, with the
    prior's mean and scale, which stays of order one: tolerances do not depend on the data's units,
    and steps are small only where the prior is not an isotropic Gaussian.

    Args:
        denoiser: The prior.
        x: Events in the denoiser's unit, with shape ``(*batch, *event)``.
        num_probes: The number of Rademacher probes in Hutchinson's estimate of the divergence. All
            events and calls share them, so that the density is a fixed function. None computes
            the exact divergence, by one Jacobian-vector product per element.
        rtol: The relative tolerance of the adaptive solver (Tsitouras 5/4).
        max_steps: The maximum number of solver steps per event.

    Returns:
        Log-densities with shape ``(*batch,)``; NaN for events that are not finite or exceed
        ``max_steps``, which NUTS treats as divergent.
    """
    size, dtype = denoiser.event_size, denoiser.dtype
    batch_shape = x.shape[: x.ndim - len(denoiser.event_shape)]

    def log_prob_one(flat: jax.Array, denoiser: Denoiser, twice: bool = False) -> jax.Array:
        flow = _Flow(denoiser)
        if num_probes is None:
            probes, weight = jnp.eye(size, dtype=dtype), 1.0
        else:
            probes = jax.random.rademacher(jax.random.key(0), (num_probes, size), dtype)
            weight = 1.0 / num_probes

        def field(
            time: jax.typing.ArrayLike, state: tuple[jax.Array, jax.Array], _: None
        ) -> tuple:
            value, tangent = jax.linearize(lambda z: flow.drift(time, z), state[0])
            return value, weight * jnp.sum(probes * jax.vmap(tangent)(probes))

        start = flow.to_z(flow.start, flat), jnp.zeros((), dtype)
        (z_last, divergence), solved = flow.solve(field, start, rtol, max_steps, twice=twice)
        noisy = denoiser.cov.noisy(denoiser.sigma_max**2)
        deviation = flow.deviation(z_last)
        quadratic = jnp.sum(deviation * noisy.solve(deviation))
        gaussian = -0.5 * (quadratic + noisy.logdet() + size * jnp.log(2 * jnp.pi))
        widened = size * jnp.log(flow.width(flow.stop) / flow.width(flow.start))
        return jnp.where(solved, gaussian + divergence + widened, jnp.nan)

    log_prob = _differentiable(log_prob_one)
    return _for_each(log_prob, denoiser, jnp.asarray(x, dtype)).reshape(batch_shape)


def flow_noise(
    denoiser: Denoiser, x: jax.Array, *, rtol: float = 1e-5, max_steps: int = 256
) -> jax.Array:
    r"""Return the standard normal noise that the probability flow maps to the given events.

    It inverts the deterministic samplers, up to their discretization error: the ODE is solved from
    :math:`x` at :math:`\sigma_{min}` to :math:`x_T = \mu + L z` at :math:`\sigma_{max}`.

    Args:
        denoiser: The prior.
        x: Events in the denoiser's unit, with shape ``(*batch, *event)``.
        rtol: The relative tolerance of the adaptive solver.
        max_steps: The maximum number of solver steps per event.

    Returns:
        The noise :math:`z`, with the shape of ``x``; NaN for events that exceed ``max_steps``.
    """
    noisy = denoiser.cov.noisy(denoiser.sigma_max**2)
    # z = L^-1 v = L^T (L L^T)^-1 v
    transpose = jax.linear_transpose(noisy.sqrt_matvec, denoiser.mean.reshape(-1))

    def noise_one(flat: jax.Array, denoiser: Denoiser) -> jax.Array:
        flow = _Flow(denoiser)
        start = flow.to_z(flow.start, flat)
        z_last, solved = flow.solve(lambda time, z, _: flow.drift(time, z), start, rtol, max_steps)
        (noise,) = transpose(noisy.solve(flow.deviation(z_last)))
        return jnp.where(solved, noise, jnp.nan)

    return _for_each(noise_one, denoiser, jnp.asarray(x, denoiser.dtype)).reshape(x.shape)


def _differentiable(f: Callable[..., jax.Array]) -> Callable[[jax.Array, Denoiser], jax.Array]:
    """Make a function differentiable to second order, in forward and reverse mode.

    The solver's checkpointed adjoint only supports first derivatives in reverse mode; the direct
    adjoint supports all, but stores every step. First derivatives therefore use the checkpointed
    adjoint, and only derivatives of these use the direct one.

    Args:
        f: A function of an event, a denoiser and ``twice``: whether it must be differentiable
            more than once.
    """

    def differentiable(flat: jax.Array, denoiser: Denoiser) -> jax.Array:
        leaves, treedef = jax.tree.flatten((flat, denoiser))

        def value(leaves: list[Any], twice: bool) -> jax.Array:
            return f(*jax.tree.unflatten(treedef, leaves), twice)

        def gradient_at(chosen: list[int]) -> Callable[..., Any]:
            def gradient(leaves: list[Any], twice: bool) -> Any:
                def value_of(differentiated: list[Any]) -> jax.Array:
                    replaced = list(leaves)
                    for i, leaf in zip(chosen, differentiated, strict=True):
                        replaced[i] = leaf
                    return value(replaced, twice)

                return jax.value_and_grad(value_of)([leaves[i] for i in chosen])

            @jax.custom_jvp
            def once(leaves: list[Any]) -> Any:
                return gradient(leaves, False)

            @once.defjvp
            def _(primals: Any, tangents: Any) -> Any:
                return jax.jvp(lambda leaves: gradient(leaves, True), primals, tangents)

            return once

        @jax.custom_jvp
        def evaluate(leaves: list[Any]) -> jax.Array:
            return value(leaves, False)

        def rule(primals: Any, tangents: Any) -> Any:
            (leaves,), (directions,) = primals, tangents
            chosen = [
                i
                for i, (leaf, direction) in enumerate(zip(leaves, directions, strict=True))
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
                and not isinstance(direction, SymbolicZero)
            ]
            out, gradients = gradient_at(chosen)(leaves)
            terms = [jnp.sum(g * directions[i]) for g, i in zip(gradients, chosen, strict=True)]
            return out, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(out)

        evaluate.defjvp(rule, symbolic_zeros=True)
        return evaluate(leaves)

    return differentiable


def _for_each(
    f: Callable[[jax.Array, Denoiser], jax.Array], denoiser: Denoiser, x: jax.Array
) -> jax.Array:
    """Apply a function to each flattened event and the denoiser at the event's context."""
    flat = x.reshape(-1, denoiser.event_size)
    contexts = denoiser.contexts(x.shape[: x.ndim - len(denoiser.event_shape)])
    return jax.vmap(lambda one, context: f(one, denoiser.at_contexts(context)))(flat, contexts)


@dataclass(frozen=True, eq=False)
class _Flow:
    r"""The probability flow in :math:`z = (x - \mu) / \sqrt{s^2 + \sigma^2}`, over log sigma."""

    denoiser: Denoiser

    @property
    def start(self) -> jax.Array:
        return jnp.log(self.denoiser.sigma_min)

    @property
    def stop(self) -> jax.Array:
        return jnp.log(self.denoiser.sigma_max)

    @property
    def mean(self) -> jax.Array:
        return self.denoiser.mean.reshape(-1)

    def width(self, time: jax.typing.ArrayLike) -> jax.Array:
        return jnp.sqrt(self.denoiser.scale**2 + jnp.exp(2 * jnp.asarray(time)))

    def to_z(self, time: jax.typing.ArrayLike, flat: jax.Array) -> jax.Array:
        return (flat - self.mean) / self.width(time)

    def deviation(self, z: jax.Array) -> jax.Array:
        """Return the deviation of :math:`x_T` from the samplers' initial mean."""
        shift = self.mean - self.denoiser.initial_mean(()).reshape(-1)
        return self.width(self.stop) * z + shift

    def drift(self, time: jax.typing.ArrayLike, z: jax.Array) -> jax.Array:
        width = self.width(time)
        x_t = (self.mean + width * z).reshape(self.denoiser.event_shape)
        residual = (x_t - self.denoiser(x_t, jnp.exp(time))).reshape(-1)
        return residual / width - jnp.exp(2 * jnp.asarray(time)) / width**2 * z

    def solve(
        self, field: Callable, start: Any, rtol: float, max_steps: int, *, twice: bool = False
    ) -> tuple[Any, jax.Array]:
        """Return the state at the highest noise level, and whether the solver reached it.

        With ``twice``, it is differentiable any number of times, but stores every step.
        """
        import diffrax  # slow to import

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            self.start,
            self.stop,
            dt0=None,
            y0=start,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
            max_steps=max_steps,
            throw=False,
            adjoint=diffrax.DirectAdjoint() if twice else diffrax.RecursiveCheckpointAdjoint(),
        )
        last = jax.tree.map(lambda leaf: leaf[0], solution.ys)
        return last, solution.result == diffrax.RESULTS.successful
