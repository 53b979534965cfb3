r"""Gaussian pseudo-observations from the curvature of a log-density.

Around parameters :math:`\theta`, a log-density with gradient :math:`g` and Hessian :math:`-H` is,
to second order, that of a Gaussian observation of :math:`\theta`,

.. math:: \theta + H^{-1} g \sim \mathcal{N}(\theta, H^{-1}),

which is recomputed at every latent value. Its guidance is :math:`(I + V H)^{-1} V g` in the space
of :math:`\theta`. In a direction :math:`u` in which the log-density is not concave, the curvature
is taken to be :math:`(u^T g)^2`, which limits the change of the log-density along :math:`u` to
about one. Student's t and Cauchy distributions are read as scale mixtures of Gaussians, with
:math:`H = (\nu + 1) / (\nu s^2 + r^2)` at the residual :math:`r`. A normal distribution whose
scale depends on the latent is observed twice, its location by the value and the logarithm of its
scale by the squared residual, with the Fisher information as curvature: :math:`1 / s^2` and 2. A
mixture (or a zero-inflated count) is observed once for each component, with the component's
variance divided by its responsibility :math:`r_k` for the value: :math:`H_k = r_k / s_k^2`.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_diffprior.linalg.batched import apply, apply_transpose, eigh
from numpyro_diffprior.reading.moments import gaussian_moments
from numpyro_diffprior.reading.unwrap import innermost

__all__ = ["PseudoObservation", "from_log_prob", "pearson_residuals", "pseudo_observe"]


class PseudoObservation(NamedTuple):
    """A Gaussian observation of parameters, equivalent up to second order.

    Attributes:
        theta: The parameters, with shape ``(*batch, p)``.
        y: Their observed values, with shape ``(*batch, p)``.
        variances: The variances of the noise, with shape ``(*batch, p)``.
        directions: The principal axes of the noise, as columns, with shape ``(*batch, p, p)``;
            None if they are the coordinate axes.
        has_residual: Whether ``y - theta`` is a residual of observed values. It is not if ``y``
            comes from the gradient of a log-density: where this is flat or not concave, the size
            of ``y - theta`` says nothing about the fit. See `pearson_residuals` instead.
    """

    theta: jax.Array
    y: jax.Array
    variances: jax.Array
    directions: jax.Array | None
    has_residual: bool = True


def pseudo_observe(
    fn: dist.Distribution,
    batch_shape: tuple[int, ...],
    value: jax.Array,
    depends: Sequence[bool],
) -> PseudoObservation:
    """Return the pseudo-observation of those parameters that depend on the latent.

    Args:
        fn: A distribution, unwrapped.
        batch_shape: The shape of its elements, each of which is observed on its own.
        value: The observed values, with shape ``batch_shape + fn.event_shape``.
        depends: Which of the distribution's leaves depend on the latent.
    """
    leaves, treedef = jax.tree.flatten(fn)
    chosen = [i for i, marked in enumerate(depends) if marked]
    own_shapes = [jnp.shape(leaves[i])[len(fn.batch_shape) :] for i in chosen]
    parts = [
        jnp.broadcast_to(leaves[i], (*batch_shape, *own)).reshape(*batch_shape, prod(own))
        for i, own in zip(chosen, own_shapes, strict=True)
    ]
    theta = jnp.concatenate(parts, axis=-1)
    if _is_heteroscedastic(fn, depends):
        return _location_and_scale(fn, batch_shape, value)
    if (by_component := _by_component(fn, batch_shape, value, depends)) is not None:
        return by_component
    is_scale_mixture = isinstance(fn, dist.StudentT | dist.Cauchy | dist.MultivariateStudentT)
    if is_scale_mixture and all(leaves[i] is fn.loc for i in chosen):
        return _scale_mixture(fn, theta, value)
    ends = [sum(map(prod, own_shapes[: i + 1])) for i in range(len(chosen) - 1)]

    def log_prob(theta: jax.Array) -> jax.Array:
        replaced = list(leaves)
        for i, own, parameter in zip(chosen, own_shapes, jnp.split(theta, ends, -1), strict=True):
            replaced[i] = parameter.reshape(*batch_shape, *own)
        return jax.tree.unflatten(treedef, replaced).log_prob(value)

    return from_log_prob(log_prob, theta)


def pearson_residuals(fn: dist.Distribution, value: jax.Array) -> jax.Array | None:
    r"""Return squared residuals :math:`(y - E[y])^2 / \mathrm{var}(y)`; None if unknown.

    Their mean over draws of the distribution is one, whatever its shape.
    """
    if fn.event_shape:
        return None
    try:
        return (value - fn.mean) ** 2 / fn.variance
    except NotImplementedError:
        return None


def _is_heteroscedastic(fn: dist.Distribution, depends: Sequence[bool]) -> bool:
    """Whether it is a normal distribution whose scale depends on the latent."""
    if not isinstance(fn, dist.Normal):
        return False
    leaves = jax.tree.leaves(fn)
    return any(marked and leaf is fn.scale for leaf, marked in zip(leaves, depends, strict=True))


def from_log_prob(
    log_prob: Callable[[jax.Array], jax.Array], theta: jax.Array
) -> PseudoObservation:
    """Return the pseudo-observation of parameters of a log-density, of shape ``(*batch, p)``."""
    differentiate = jax.grad(lambda theta: log_prob(theta).sum())
    basis = jnp.eye(theta.shape[-1], dtype=theta.dtype)

    def column(e: jax.Array) -> jax.Array:
        return jax.jvp(differentiate, (theta,), (jnp.broadcast_to(e, theta.shape),))[1]

    gradient, hessian = differentiate(theta), jax.vmap(column, out_axes=-1)(basis)
    curvature, directions = eigh(-(hessian + hessian.mT) / 2)
    along = apply_transpose(directions, gradient)
    eps = jnp.finfo(theta.dtype).eps
    rounding = eps * theta.shape[-1] * jnp.abs(curvature).max(-1, keepdims=True)
    curvature = jnp.where(curvature > rounding, curvature, along**2)
    # Rounding errors in directions without information would swamp the others.
    known = curvature > rounding
    along = jnp.where(known, along, 0)
    curvature = jnp.where(known, curvature, jnp.maximum(rounding, eps**2))
    y = theta + apply(directions, along / curvature)
    return PseudoObservation(theta, y, 1 / curvature, directions, has_residual=False)


def _scale_mixture(
    fn: dist.StudentT | dist.Cauchy | dist.MultivariateStudentT,
    theta: jax.Array,
    value: jax.Array,
) -> PseudoObservation:
    if isinstance(fn, dist.MultivariateStudentT):
        size = theta.shape[-1]
        matrix = jnp.broadcast_to(fn.covariance_matrix, (*theta.shape, size))
        variances, directions = eigh(matrix)
        along = apply_transpose(directions, value - theta)
        square = jnp.sum(along**2 / variances, axis=-1, keepdims=True)
        df = jnp.expand_dims(fn.df, -1)
        factor = (df + square) / (df + size)
        return PseudoObservation(theta, value, variances * factor, directions)
    df = fn.df if isinstance(fn, dist.StudentT) else jnp.ones(())
    variance = (df * fn.scale**2 + (value - theta[..., 0]) ** 2) / (df + 1)
    return PseudoObservation(theta, value[..., None], variance[..., None], None)


def _location_and_scale(
    fn: dist.Normal, batch_shape: tuple[int, ...], value: jax.Array
) -> PseudoObservation:
    loc, scale = (jnp.broadcast_to(leaf, batch_shape) for leaf in (fn.loc, fn.scale))
    log_scale = jnp.log(scale)
    # Beyond three deviations, the location is wrong rather than the scale.
    excess = (jnp.minimum(((value - loc) / scale) ** 2, 9) - 1) / 2
    theta = jnp.stack((loc, log_scale), axis=-1)
    y = jnp.stack((value, log_scale + excess), axis=-1)
    variances = jnp.stack((scale**2, jnp.full_like(scale, 0.5)), axis=-1)
    return PseudoObservation(theta, y, variances, None)


def _by_component(
    fn: dist.Distribution, batch_shape: tuple[int, ...], value: jax.Array, depends: Sequence[bool]
) -> PseudoObservation | None:
    """Observe the components of a mixture whose means depend on the latent.

    Returns None if the distribution is no mixture, if its weights or a normal component's scale
    depend on the latent, or if a component has no variances to match.
    """
    match fn:
        case dist.MixtureSameFamily():
            components, weights = [fn.component_distribution], fn.mixing_distribution
        case dist.MixtureGeneral():
            components, weights = fn.component_distributions, fn.mixing_distribution
        case dist.ZeroInflatedLogits():
            components, weights = [fn.base_dist], (fn.gate, fn.gate_logits)
        case dist.ZeroInflatedProbs():
            components, weights = [fn.base_dist], fn.gate
        case _:
            return None
    bases = [innermost(component) for component in components]
    scales = [base.scale for base in bases if isinstance(base, dist.Normal)]
    fixed = jax.tree.leaves((weights, scales))
    marked = [leaf for leaf, mark in zip(jax.tree.leaves(fn), depends, strict=True) if mark]
    if fn.event_shape or any(leaf is other for leaf in marked for other in fixed):
        return None
    moments = [gaussian_moments(component) for component in components]
    known = [m for m in moments if m is not None and not m.full and m.transform is None]
    if len(known) < len(moments):
        return None
    if isinstance(fn, dist.ZeroInflatedProbs):
        log_joint = jnp.log1p(-fn.gate) + fn.base_dist.log_prob(value)
        log_joint, mean, variance = (
            jnp.expand_dims(v, -1) for v in (log_joint, known[0].mean, known[0].cov)
        )
    else:
        log_joint = fn.component_log_probs(value)
        mean, variance = (
            v[0] if len(components) == 1 else jnp.stack(v, axis=-1)
            for v in ([m.mean for m in known], [m.cov for m in known])
        )
    probability = jnp.exp(log_joint - fn.log_prob(value)[..., None])
    # The floor avoids a division by zero for a component of negligible responsibility.
    variance = variance / jnp.maximum(probability, jnp.finfo(mean.dtype).eps)
    shape = (*batch_shape, mean.shape[-1])
    mean, y, variance = (jnp.broadcast_to(v, shape) for v in (mean, value[..., None], variance))
    return PseudoObservation(mean, y.astype(mean.dtype), variance, None)
