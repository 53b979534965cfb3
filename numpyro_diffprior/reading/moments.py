r"""The first two moments of NumPyro's distributions, for guidance.

Moment matching replaces an observation :math:`y \sim p(y \mid \theta)` by a Gaussian one with the
mean and the variance of :math:`p` at the current latent value. For exponential families this is
Fisher scoring. A distribution that has no moments, or that its moments describe badly (the median
locates a Laplace distribution better than the mean), enters by the curvature of its log-density
instead (`numpyro_diffprior.reading.curvature`).
"""

from collections.abc import Callable
from functools import singledispatch
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import digamma, polygamma
from numpyro.distributions.transforms import AffineTransform

from numpyro_diffprior.linalg.batched import einsum, matmul

__all__ = ["Moments", "gaussian_moments", "handling", "is_wrapper"]


class Moments(NamedTuple):
    """The first two moments of a distribution of observed values.

    Attributes:
        mean: The mean, with shape ``batch_shape + event_shape`` (with ``full`` the event, or its
            last axis, may be flattened).
        cov: The variances, shaped as the mean, or with ``full`` the covariance matrices over the
            last axis of the mean, with shape ``mean.shape + mean.shape[-1:]``.
        full: Whether ``cov`` holds matrices.
        mask: Which values were observed, broadcastable to the mean.
        transform: The function of each value that has these moments (None: the value itself).
    """

    mean: jax.Array
    cov: jax.Array
    full: bool = False
    mask: jax.Array | bool = True
    transform: Callable[[jax.Array], jax.Array] | None = None


@singledispatch
def gaussian_moments(fn: dist.Distribution) -> Moments | None:
    """Return mean and covariance of a distribution; register your own distributions here.

    A return value of None means that there are no moments to match: guidance then uses the
    curvature of the log-density with respect to the distribution's parameters.

    Raises:
        ValueError: If the distribution's type is not registered.
    """
    raise ValueError(
        f"no moments are known for observations from {type(fn).__name__}; register them with "
        f"`@gaussian_moments.register({type(fn).__name__})`, a function of the distribution that "
        "returns `Moments(mean, variance)`, or None to use the curvature of its log-density."
    )


# Wrappers of other distributions.


@gaussian_moments.register(dist.ExpandedDistribution)
@gaussian_moments.register(dist.Independent)
@gaussian_moments.register(dist.MaskedDistribution)
def _wrapped(fn: dist.Distribution) -> Moments | None:
    base = fn.base_dist
    moments = gaussian_moments(base)
    if moments is None:
        return None
    rank = len(base.batch_shape)
    batch_shape = fn.shape()[: len(fn.shape()) - base.event_dim]
    mean, cov = (
        jnp.broadcast_to(array, (*batch_shape, *array.shape[rank:]))
        for array in (moments.mean, moments.cov)
    )
    if isinstance(fn, dist.MaskedDistribution):
        mask = jnp.asarray(fn._mask)  # NumPyro has no public name for it
        mask = mask.reshape(*mask.shape, *(1,) * (mean.ndim - len(batch_shape)))
        moments = moments._replace(mask=jnp.logical_and(moments.mask, mask))
    return moments._replace(mean=mean, cov=cov)


def is_wrapper(fn: dist.Distribution) -> bool:
    """Whether a distribution is read as the one that it expands, masks or declares independent.

    A subclass of such a wrapper whose own moments are registered is not one.
    """
    return gaussian_moments.dispatch(type(fn)) is _wrapped


@gaussian_moments.register
def _transformed(fn: dist.TransformedDistribution) -> Moments | None:
    """Return the moments of an affine map; None for other maps, which are read by curvature."""
    base = gaussian_moments(fn.base_dist)
    is_affine = all(type(t) is AffineTransform for t in fn.transforms)
    if base is None or base.full or base.transform or not is_affine:
        return None
    mean, variance = base.mean, base.cov
    for transform in fn.transforms:
        mean, variance = transform(mean), transform.scale**2 * variance
    return Moments(jnp.broadcast_to(mean, fn.shape()), jnp.broadcast_to(variance, fn.shape()))


# Elementwise families.


def _by_element(fn: dist.Distribution) -> Moments:
    """Return NumPyro's own mean and variance.

    The variance of a discrete distribution is at least machine epsilon: it may be zero to
    rounding.
    """
    mean, variance = (jnp.broadcast_to(v, fn.shape()) for v in (fn.mean, fn.variance))
    if fn.is_discrete:
        mean = mean.astype(jnp.result_type(float, mean))
        variance = jnp.maximum(variance, jnp.finfo(mean.dtype).eps)
    return Moments(mean, variance)


for _family in (
    dist.BernoulliLogits,
    dist.BernoulliProbs,
    dist.BinomialLogits,
    dist.BinomialProbs,
    dist.Chi2,
    dist.DiscreteUniform,
    dist.Exponential,
    dist.Gamma,
    dist.GammaPoisson,
    dist.GeometricLogits,
    dist.GeometricProbs,
    dist.LogNormal,
    dist.LogUniform,
    dist.NegativeBinomial2,
    dist.NegativeBinomialLogits,
    dist.NegativeBinomialProbs,
    dist.Normal,
    dist.Poisson,
    dist.Uniform,
    dist.Weibull,
    # Truncated families whose moments NumPyro has.
    dist.LeftTruncatedGamma,
    dist.RightTruncatedGamma,
    dist.TwoSidedTruncatedGamma,
):
    gaussian_moments.register(_family)(_by_element)


@gaussian_moments.register(dist.HalfNormal)
def _of_squares(fn: dist.HalfNormal) -> Moments:
    """Return the moments of the squares, which are sufficient for the scale."""
    variance = jnp.broadcast_to(fn.scale**2, fn.shape())
    return Moments(variance, 2 * variance**2, transform=jnp.square)


@gaussian_moments.register(dist.Beta)
@gaussian_moments.register(dist.Dirichlet)
def _of_logs(fn: dist.Beta | dist.Dirichlet) -> Moments:
    """Return the moments of the logarithms, which are sufficient for the concentrations."""
    if isinstance(fn, dist.Beta):
        pair = jnp.broadcast_arrays(fn.concentration1, fn.concentration0)
        concentration = jnp.broadcast_to(jnp.stack(pair, axis=-1), (*fn.batch_shape, 2))
        transform = _log_parts
    else:
        concentration, transform = jnp.broadcast_to(fn.concentration, fn.shape()), _log
    total = concentration.sum(-1, keepdims=True)
    own = polygamma(1, concentration)[..., None] * jnp.eye(concentration.shape[-1])
    cov = own - polygamma(1, total)[..., None]
    return Moments(digamma(concentration) - digamma(total), cov, full=True, transform=transform)


def _log_parts(y: jax.Array) -> jax.Array:
    """Return the logarithms of y and 1 - y, with 1 - y at least machine epsilon."""
    return _log(jnp.stack([y, jnp.maximum(1 - y, jnp.finfo(y.dtype).eps)], axis=-1))


def _log(y: jax.Array) -> jax.Array:
    """Return the logarithm, which is finite at zero."""
    return jnp.log(jnp.maximum(y, jnp.finfo(y.dtype).tiny))


@gaussian_moments.register(dist.MultinomialLogits)
@gaussian_moments.register(dist.MultinomialProbs)
def _of_counts(fn: dist.Distribution) -> Moments:
    """Return the moments of independent Poisson counts with the same means.

    Since their total does not depend on the latent, they carry the same information as the full,
    singular covariance of multinomial counts.
    """
    mean = jnp.broadcast_to(fn.mean, fn.shape())
    return Moments(mean, jnp.maximum(mean, jnp.finfo(mean.dtype).eps))


@gaussian_moments.register
def _of_overdispersed_counts(fn: dist.DirichletMultinomial) -> Moments | None:
    """Return the moments of overdispersed multinomial counts; None for few categories."""
    if fn.event_shape[0] <= _MAX_CATEGORIES:
        return None
    mean, variance, *_ = _of_counts(fn)
    total = fn.concentration.sum(-1)
    spread = (fn.total_count + total) / (1 + total)
    return Moments(mean, variance * spread[..., None])


_MAX_CATEGORIES = 16


@gaussian_moments.register(dist.LeftTruncatedDistribution)
@gaussian_moments.register(dist.RightTruncatedDistribution)
@gaussian_moments.register(dist.TwoSidedTruncatedDistribution)
def _truncated(fn: dist.Distribution) -> Moments | None:
    """Return the moments of a truncated normal; NumPyro has none for other bases."""
    return _by_element(fn) if isinstance(fn.base_dist, dist.Normal) else None


# Vector-valued families.


@gaussian_moments.register(dist.MultivariateNormal)
@gaussian_moments.register(dist.LowRankMultivariateNormal)
@gaussian_moments.register(dist.GaussianCopula)
def _(fn: dist.Distribution) -> Moments:
    """Return a Gaussian's moments; a copula's correlation is taken from its normal scores."""
    if not isinstance(fn, dist.GaussianCopula):
        return _gaussian(fn, fn.covariance_matrix)
    deviation = jnp.sqrt(fn.variance)
    correlation = fn.base_dist.covariance_matrix
    return _gaussian(fn, deviation[..., :, None] * correlation * deviation[..., None, :])


def _gaussian(fn: dist.Distribution, cov: jax.Array) -> Moments:
    """Return the distribution's mean and the covariance, broadcast to its batch."""
    cov = jnp.broadcast_to(cov, (*fn.batch_shape, *fn.event_shape * 2))
    return Moments(jnp.broadcast_to(fn.mean, fn.shape()), cov, full=True)


@gaussian_moments.register
def _(fn: dist.CAR) -> Moments:
    return _gaussian(fn, jnp.linalg.inv(fn.precision_matrix))


@gaussian_moments.register
def _(fn: dist.GaussianRandomWalk) -> Moments:
    steps = jnp.arange(1, fn.num_steps + 1)
    scale = jnp.broadcast_to(fn.scale, fn.batch_shape)[..., None, None]
    cov = scale**2 * jnp.minimum(steps[:, None], steps)
    return Moments(jnp.zeros(fn.shape(), cov.dtype), cov, full=True)


@gaussian_moments.register
def _(fn: dist.MatrixNormal) -> Moments:
    row, column = (matmul(s, s.mT) for s in (fn.scale_tril_row, fn.scale_tril_column))
    size = prod(fn.event_shape)
    cov = einsum("...ij,...kl->...ikjl", row, column)
    cov = jnp.broadcast_to(cov, (*fn.batch_shape, *fn.event_shape * 2))
    cov = cov.reshape(*fn.batch_shape, size, size)
    mean = jnp.broadcast_to(fn.loc, fn.shape()).reshape(*fn.batch_shape, size)
    return Moments(mean, cov, full=True)


@gaussian_moments.register(dist.CirculantNormal)
@gaussian_moments.register(dist.GaussianStateSpace)
@gaussian_moments.register(dist.ZeroSumNormal)
def _affine(fn: dist.TransformedDistribution) -> Moments:
    """Return the moments of an affine map of Gaussian vectors, by the map's Jacobian."""
    base = gaussian_moments(fn.base_dist)
    assert base is not None
    blocks = base.mean.shape[len(fn.batch_shape) :]

    def apply(x: jax.Array) -> jax.Array:
        for transform in fn.transforms:
            x = transform(x)
        return x.reshape(*fn.batch_shape, -1)

    mean = base.mean.astype(base.cov.dtype)
    origin = jnp.broadcast_to(mean, (*fn.batch_shape, *blocks))
    basis = jnp.eye(prod(blocks), dtype=origin.dtype).reshape(-1, *blocks)

    def column(e: jax.Array) -> jax.Array:
        return jax.jvp(apply, (origin,), (jnp.broadcast_to(e, origin.shape),))[1]

    matrix = jax.vmap(column, out_axes=-1)(basis)
    if base.full:
        matrix = matrix.reshape(*matrix.shape[:-1], *blocks)
        cov = einsum("...its,...tsu,...jtu->...ij", matrix, base.cov, matrix)
    else:
        variance = base.cov.reshape(*base.cov.shape[: -len(blocks)], -1)
        cov = einsum("...id,...d,...jd->...ij", matrix, variance, matrix)
    return Moments(apply(origin), cov, full=True)


# Families read by the curvature of their log-density.


def _no_moments(fn: dist.Distribution) -> None:
    return None


for _family in (
    dist.AsymmetricLaplace,
    dist.AsymmetricLaplaceQuantile,
    dist.BetaBinomial,
    dist.BetaNegativeBinomial,
    dist.CategoricalLogits,
    dist.CategoricalProbs,
    dist.Cauchy,
    dist.Dagum,
    dist.DoublyTruncatedPowerLaw,
    dist.FoldedDistribution,
    dist.Gompertz,
    dist.Gumbel,
    dist.HalfCauchy,
    dist.HurdleLogits,
    dist.HurdleProbs,
    dist.IntervalCensoredDistribution,
    dist.InverseGamma,
    dist.Kumaraswamy,
    dist.Laplace,
    dist.LeftCensoredDistribution,
    dist.Levy,
    dist.Logistic,
    dist.LowerTruncatedPowerLaw,
    dist.MultivariateStudentT,
    dist.OrderedLogistic,
    dist.Pareto,
    dist.ProjectedNormal,
    dist.RightCensoredDistribution,
    dist.SineBivariateVonMises,
    dist.SineSkewed,
    dist.SoftLaplace,
    dist.StudentT,
    dist.Unit,
    dist.VonMises,
):
    gaussian_moments.register(_family)(_no_moments)


@gaussian_moments.register(dist.MixtureGeneral)
@gaussian_moments.register(dist.MixtureSameFamily)
@gaussian_moments.register(dist.ZeroInflatedProbs)
def _of_components(fn: dist.Distribution) -> None:
    """Return None: `reading.curvature.pseudo_observe` uses the components' moments."""
    return None


@gaussian_moments.register
def _refuse_delta(fn: dist.Delta) -> Moments:
    raise ValueError(
        "a Delta observation has no noise, and its posterior no density; observe it through a "
        "Normal whose scale is the error of the recorded values."
    )


@gaussian_moments.register(dist.ImproperUniform)
@gaussian_moments.register(dist.EulerMaruyama)
@gaussian_moments.register(dist.InverseWishart)
@gaussian_moments.register(dist.InverseWishartCholesky)
@gaussian_moments.register(dist.LKJ)
@gaussian_moments.register(dist.LKJCholesky)
@gaussian_moments.register(dist.TruncatedPolyaGamma)
@gaussian_moments.register(dist.Wishart)
@gaussian_moments.register(dist.WishartCholesky)
def _refuse(fn: dist.Distribution) -> Moments:
    raise ValueError(
        f"observations from {type(fn).__name__} are not read; add its log-density to the model by "
        "`numpyro.factor`, whose gradient and curvature guidance uses."
    )


_LABELS = {
    gaussian_moments.dispatch(object): "unknown: register it",
    _refuse: "refused: add its log-density by `numpyro.factor`",
    _refuse_delta: "refused: it has no noise",
    _wrapped: "like the wrapped distribution",
    _by_element: "moments",
    _of_logs: "mean and covariance of its logarithms",
    _of_counts: "moments, as independent counts",
    _of_overdispersed_counts: f"curvature up to {_MAX_CATEGORIES} classes, else moments",
    _of_squares: "moments of its square",
    _of_components: (
        "moments of its components; curvature if weights or scales depend on the latent"
    ),
    _no_moments: "curvature",
    _truncated: "moments of a truncated normal, curvature of others",
    _transformed: "moments of an affine map, curvature of others",
}


def handling(family: type[dist.Distribution]) -> str:
    """Describe how observations from a family are read, for the table in the docs."""
    rule = gaussian_moments.dispatch(family)
    label = _LABELS.get(rule, "mean and covariance")
    invertible = issubclass(family, dist.TransformedDistribution) and rule in _TRANSFORMED_BACK
    if not invertible or issubclass(family, dist.FoldedDistribution):
        return label
    return f"like its base, transformed back; if the transformation depends on the latent: {label}"


# The rules of transformed distributions whose values are transformed back.
_TRANSFORMED_BACK = (_by_element, _no_moments, _transformed)
