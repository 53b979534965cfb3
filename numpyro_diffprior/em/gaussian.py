r"""A Gaussian over events, fitted to linear observations of the events alone.

Events :math:`x \sim \mathcal{N}(\mu, \Sigma)` are observed as :math:`y = A x + b + n`, with noise
:math:`n \sim \mathcal{N}(0, N)`; :math:`A, b, N` differ between events, and each may hide much of
its event. Expectation maximization maximizes the marginal likelihood of all observations; both
of its steps have a closed form, in coordinates in which prior and noise are white: with
:math:`x = \mu + L \epsilon`, :math:`\Sigma = L L^T` and :math:`B = N^{-1/2} A L`,

.. math:: \begin{pmatrix} B^T \\ I \end{pmatrix} =
    \begin{pmatrix} W^T \\ R^{-1} \end{pmatrix} R, \qquad
    t = R^{-T} N^{-1/2} (y - A \mu - b), \qquad
    \epsilon \mid y \sim \mathcal{N}(W^T t, I - W^T W).

This QR decomposition never squares the ratio of signal to noise, so that float32 is enough.

Small events have a full covariance. One of few events would be fitted to noise, so that it is
shrunk to stationary correlations, see `shrink_correlations`. With a strength :math:`\nu`, in a
number of events, each iteration takes

.. math:: \Sigma \leftarrow (n \Sigma_{EM} + \nu T(\Sigma_{EM})) / (n + \nu),

the mode under an inverse Wishart distribution about :math:`T`. The strength and the number of
iterations are those of the greatest log-evidence of held-out events.

Large events have the covariance of factor analysis,
:math:`x = \mu + F z + D^{1/2} e`, that is :math:`L = (D^{1/2}, F)`. If each of their elements is
observed on its own (through a mask, say), the cost of an event is that of its factors only.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712 (a Gaussian as initial prior, fitted with draws).
    Rubin and Thayer, *EM algorithms for ML factor analysis*, Psychometrika 47, 1982.
    Liu, Rubin and Wu, *Parameter expansion to accelerate EM: the PX-EM algorithm*, Biometrika 85,
    1998 (the factors' own covariance, absorbed into their loadings).
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.memory import advise, check_memory
from numpyro_diffprior._compile.program import call
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.linalg.batched import by_matrix, cholesky, einsum, inverse_lower
from numpyro_diffprior.linalg.covariances import Covariance, Dense, DiagonalPlusLowRank
from numpyro_diffprior.linalg.shrinkage import shrink_correlations

__all__ = [
    "MAX_DENSE",
    "GaussianFit",
    "fit_gaussian",
]


class GaussianFit(NamedTuple):
    """A Gaussian fitted to observations.

    Attributes:
        mean: Its mean, with shape ``event_shape``.
        cov: Its covariance, over flattened events.
        log_evidence: The log-density of all observed values under the Gaussian before each
            iteration, with shape ``(num_iterations,)``, and NaN for iterations that were left out.
            Without shrinkage it does not decrease, up to rounding.
        shrinkage: The strength of the shrinkage, in a number of events.
    """

    mean: jax.Array
    cov: Covariance
    log_evidence: jax.Array
    shrinkage: jax.Array


class _Observations(NamedTuple):
    """A block of events as observed, in units of the noise.

    Attributes:
        operator: :math:`N^{-1/2} A`, with shape ``(n, m, d)``, or its diagonals, ``(n, d)``.
        residual: :math:`N^{-1/2} (y - b)`, with shape ``(n, m)``.
        constant: The terms of the log-evidence without the Gaussian, with shape ``(n,)``.
        num_values: The number of residuals that depend on the event, with shape ``(n,)``.
    """

    operator: jax.Array
    residual: jax.Array
    constant: jax.Array
    num_values: jax.Array


class _Full(NamedTuple):
    """A Gaussian with covariance ``root root^T``."""

    mean: jax.Array
    root: jax.Array


class _FullMoments(NamedTuple):
    """The first two moments of the white coordinates given ``y``, summed or averaged over events.

    Attributes:
        mean: The mean, with shape ``(d,)``.
        excess: The second moment minus the prior's, the identity, with shape ``(d, d)``.
    """

    mean: jax.Array
    excess: jax.Array


class _Factors(NamedTuple):
    """A Gaussian with covariance ``diag(scale)^2 + factor factor^T``."""

    mean: jax.Array
    scale: jax.Array
    factor: jax.Array


class _FactorMoments(NamedTuple):
    """`_FullMoments` for the elements' own coordinates ``e`` and the factors ``z``.

    Attributes:
        e: The mean of ``e``, with shape ``(d,)``.
        z: The mean of ``z``, with shape ``(rank,)``.
        ee: The diagonal of the second moment of ``e``, minus one, with shape ``(d,)``.
        ez: The mixed second moment, with shape ``(d, rank)``.
        zz: The second moment of ``z``, minus the identity, with shape ``(rank, rank)``.
    """

    e: jax.Array
    z: jax.Array
    ee: jax.Array
    ez: jax.Array
    zz: jax.Array


class _Evidence(NamedTuple):
    """The log-evidence of the events that are used, and of the others."""

    used: jax.Array
    others: jax.Array


class _Choice(NamedTuple):
    """The best fit so far: its log-evidence of held-out events, strength and iterations."""

    evidence: jax.Array
    strength: jax.Array
    num_iterations: jax.Array


class _Observed(NamedTuple):
    """All events as observed: kept, or read anew each time if they are too large.

    Attributes:
        items: Observations of all blocks, or their indices.
        read: Maps an item to observations.
    """

    items: Any
    read: Callable[[Any], _Observations]

    @classmethod
    def of(cls, observe: Callable[[jax.Array], _Observations], blocks: jax.Array) -> "_Observed":
        shapes = jax.tree.leaves(jax.eval_shape(observe, blocks[0]))
        if len(blocks) * sum(prod(shape.shape) for shape in shapes) > _MAX_KEPT:
            return cls(blocks, observe)
        return cls(jax.lax.map(observe, blocks), lambda seen: seen)

    def sum(self, function: Callable[[_Observations], Any]) -> Any:
        """Sum the arrays that a function of a block returns over all blocks."""

        def add(total: Any, item: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(self.read(item))), None

        return jax.lax.scan(add, self._zeros(function), self.items)[0]

    def expect(
        self, function: Callable[[_Observations, jax.Array], Any], used: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return the log-evidence of each event, and the sum of the moments of those in use."""

        def add(total: Any, item: Any) -> tuple[Any, jax.Array]:
            seen, own = item
            evidence, moments = function(self.read(seen), own)
            return jax.tree.map(jnp.add, total, moments), evidence

        zeros = self._zeros(lambda seen: function(seen, used[0])[1])
        totals, evidence = jax.lax.scan(add, zeros, (self.items, used))
        return evidence, totals

    def _zeros(self, function: Callable[[_Observations], Any]) -> Any:
        first = jax.tree.map(lambda leaf: leaf[0], self.items)
        shapes = jax.eval_shape(lambda item: function(self.read(item)), first)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


MAX_DENSE = 512
"""The largest number of elements of events that get a dense covariance."""

_ENOUGH = 16  # events per element of an event: with more, the covariance is not shrunk
_STRENGTHS = (0.0, 1.0, 4.0)  # events per element
_SHARE_HELD_OUT = 4  # one of so many events
_MAX_KEPT = 2**25  # elements of observations that are kept from one iteration to the next


def fit_gaussian(
    read_block: Callable[[jax.Array], Likelihood],
    num_events: int,
    *,
    event_shape: tuple[int, ...],
    batch_size: int = 256,
    num_iterations: int = 32,
    rank: int | None = None,
    max_dense: int = MAX_DENSE,
    shrinkage: float | None = 0.0,
    dtype: DTypeLike | None = None,
) -> GaussianFit:
    """Fit a Gaussian to linear observations of events by expectation maximization.

    The initial mean is the single event that explains all observations best (zero, if the
    covariance has low rank); the initial covariance is isotropic and explains the mean square of
    the residuals. Directions that are never observed keep a mean of zero and this variance.

    Args:
        read_block: Maps indices of events, with shape ``(n,)``, to their likelihood; traced.
        num_events: The number of events.
        event_shape: The shape of one event, of ``d`` elements.
        batch_size: The number of events in memory at a time: a few arrays of
            ``batch_size * m * d``, or of ``batch_size * d * rank`` where ``d > max_dense`` and
            the likelihood is elementwise. Beside them, the observations of all events are kept,
            if they have at most 2^25 elements; larger ones are read anew in each iteration.
        num_iterations: The number of sweeps through all events. On digits the default comes
            within 0.2 nats per event of the limit with half of the pixels hidden; with three
            quarters hidden, 64 are needed.
        rank: The number of factors beyond ``max_dense`` elements (default: 32).
        max_dense: The largest ``d`` that gets a dense covariance; 0 asks for the low-rank form.
        shrinkage: The strength of the shrinkage of a dense covariance, in a number of events. None
            chooses it, of 0, ``d`` and ``4 d``, if there are fewer than ``16 d`` events, which
            takes four fits instead of one.
        dtype: The floating type of the result, JAX's default if None.

    Raises:
        ValueError: If there are no events, an option is not positive, or a likelihood is not
            linear or has other events than those of the indices.
    """
    size = prod(event_shape)
    num_events = check_count("fit_gaussian", "num_events", num_events)
    batch_size = check_count("fit_gaussian", "batch_size", batch_size)
    num_iterations = check_count("fit_gaussian", "num_iterations", num_iterations)
    rank = min(32 if rank is None else check_count("fit_gaussian", "rank", rank), size)
    dtype = jnp.zeros((), dtype).dtype
    batch_size = min(batch_size, num_events)
    blocks = jnp.arange(-(-num_events // batch_size) * batch_size).reshape(-1, batch_size)

    def read(block: jax.Array) -> Likelihood:
        likelihood = read_block(jnp.minimum(block, num_events - 1))
        _check(likelihood, batch_size, event_shape)
        return likelihood

    dense = size <= max_dense

    def observe(block: jax.Array) -> _Observations:
        observations = _observe(read(block), dense, dtype)
        # Padding observes nothing: its posterior is the prior, which has no excess.
        valid = block < num_events
        return jax.tree.map(
            lambda a: jnp.where(valid.reshape(-1, *(1,) * (a.ndim - 1)), a, 0), observations
        )

    def expect(state: Any, seen: _Observations, used: jax.Array) -> tuple[jax.Array, Any]:
        if dense:
            return _expect_full(state, seen, used)
        return (_expect_elementwise if seen.operator.ndim == 2 else _expect_factors)(state, seen)

    def run() -> tuple[jax.Array, Covariance, jax.Array, jax.Array]:
        observed = _Observed.of(observe, blocks)
        start: Any = (
            _start_full(observed, size, dtype)
            if dense
            else _start_factors(observed, size, rank, dtype)
        )

        def fit(strength: jax.Array, used: jax.Array, num: jax.Array) -> tuple[Any, _Evidence]:
            """Fit to the events that are used, in so many iterations."""
            num_used = used.sum()

            def iterate(state: Any, number: jax.Array) -> tuple[Any, _Evidence]:
                evidence, totals = observed.expect(partial(expect, state), used)
                moments = jax.tree.map(lambda a: a / num_used, totals)
                new = (
                    _maximize_full(state, moments, strength / (strength + num_used), event_shape)
                    if dense
                    else _maximize_factors(state, moments)
                )
                going_on = number < num
                new = jax.tree.map(lambda a, b: jnp.where(going_on, a, b), new, state)
                own = jnp.where(going_on, (evidence * used).sum(), jnp.nan)
                return new, _Evidence(own, (evidence * (1 - used)).sum())

            return jax.lax.scan(iterate, start, jnp.arange(num_iterations))

        every = (blocks < num_events).astype(dtype)
        if shrinkage is None and dense and _SHARE_HELD_OUT <= num_events < _ENOUGH * size:
            strengths = size * jnp.asarray(_STRENGTHS, dtype)
            state, evidence, strength = _choose(fit, strengths, every, num_events, num_iterations)
        else:
            strength = jnp.asarray(0.0 if shrinkage is None else shrinkage, dtype)
            state, evidence = fit(strength, every, jnp.asarray(num_iterations))
        return state.mean.reshape(event_shape), _covariance(state), evidence.used, strength

    def remedy(factor: float, *_: Any) -> str:
        return f"{advise('batch_size', factor, batch_size)} (EStep: max_batch_size)"

    return GaussianFit(*call(run, check=check_memory("Gaussian fits", remedy)))


def _check(likelihood: Likelihood, batch_size: int, event_shape: tuple[int, ...]) -> None:
    if not likelihood.linear:
        raise ValueError(
            "fit_gaussian: expected observations whose mean is affine in the event and whose "
            "noise does not depend on it (`likelihood.linear`), got a non-linear likelihood; give "
            "the prior a mean and a covariance of your own instead."
        )
    batch_shape = likelihood.batch_shape
    if likelihood.event_shape != event_shape or prod(batch_shape) != batch_size:
        raise ValueError(
            f"fit_gaussian: expected {batch_size} events of shape {event_shape}, got batch shape "
            f"{batch_shape} and event shape {likelihood.event_shape}; let `read_block` return one "
            "event per index."
        )


def _origin(likelihood: Likelihood, dtype: DTypeLike) -> jax.Array:
    return jnp.zeros((*likelihood.batch_shape, *likelihood.event_shape), dtype)


def _observe(likelihood: Likelihood, dense: bool, dtype: DTypeLike) -> _Observations:
    """Whiten the observations of a block, element by element if there is no need of matrices."""
    batch_shape, size = likelihood.batch_shape, prod(likelihood.event_shape)
    origin = _origin(likelihood, dtype)
    local = likelihood.linearize(origin)
    if likelihood.elementwise and not dense:
        ones = jnp.ones((*batch_shape, size), dtype)
        depends = local.matvec(ones) != 0
        values = jnp.where(depends, local.residual, 0)
        precision = local.precision(ones)
        known = precision > 0
        mean = local.transpose(local.noise.solve(values)) / jnp.where(known, precision, 1)
        # Several values of one element enter by their weighted mean.
        rest = jnp.where(depends, values - local.matvec(mean), 0)
        white = jnp.sqrt(jnp.where(known, precision, 0))
        residual = white * mean
        excess, num_white = (rest * local.noise.solve(rest)).sum(-1), known.sum(-1)
    else:
        operator = likelihood.operator(origin)
        white = jax.vmap(local.noise.whiten, in_axes=-1, out_axes=-1)(operator)
        depends, rows = (operator != 0).any(-1), (white != 0).any(-1)
        residual = jnp.where(rows, local.noise.whiten(local.residual), 0)
        excess, num_white = jnp.zeros(()), depends.sum(-1)

    # Masked values have a zero row. They do not depend on the event or count in the evidence.
    hidden = jnp.where(depends, 0, jnp.log(local.noise.diagonal())).sum(-1)
    num_values = depends.sum(-1)
    constant = local.noise.logdet() - hidden + num_values * jnp.log(2 * jnp.pi) + excess
    constant = jnp.broadcast_to(-0.5 * constant, batch_shape)

    num = prod(batch_shape)
    white = white.reshape(num, *white.shape[len(batch_shape) :]).astype(dtype)
    residual = residual.reshape(num, -1).astype(dtype)
    constant, num_white = constant.reshape(num).astype(dtype), num_white.reshape(num)
    if white.ndim > 2 and residual.shape[-1] > size:
        # More values than elements: only their projections on the columns depend on the event.
        basis, white = by_matrix(jnp.linalg.qr, white)
        projected = einsum("nmk,nm->nk", basis, residual)
        rest = residual - einsum("nmk,nk->nm", basis, projected)
        residual, constant = projected, constant - 0.5 * jnp.square(rest).sum(-1)
        num_white = jnp.minimum(num_white, size)
    return _Observations(white, residual, constant, num_white.astype(dtype))


def _choose(
    fit: Callable[..., tuple[Any, _Evidence]],
    strengths: jax.Array,
    every: jax.Array,
    num_events: int,
    num_iterations: int,
) -> tuple[Any, _Evidence, jax.Array]:
    """Fit with the strength and the iterations of greatest log-evidence of held-out events.

    All fits have one compiled program, the last one, to all events, too.
    """
    order = np.random.default_rng(0).permutation(num_events)
    is_held_out = np.zeros(every.size, bool)
    is_held_out[order[: num_events // _SHARE_HELD_OUT]] = True
    some = jnp.where(is_held_out.reshape(every.shape), 0, every)

    def attempt(best: _Choice, number: jax.Array) -> tuple[_Choice, Any]:
        is_last = number == len(strengths)
        strength = jnp.where(is_last, best.strength, strengths[number])
        num = jnp.where(is_last, best.num_iterations, num_iterations)
        state, evidence = fit(strength, jnp.where(is_last, every, some), num)
        others = jnp.where(jnp.isnan(evidence.others), -jnp.inf, evidence.others)
        at = jnp.argmax(others)
        is_better = ~is_last & (others[at] > best.evidence)
        # What comes after the last iteration is not known; if it is still rising, all are taken.
        chosen = jnp.where(at == num_iterations - 1, num_iterations, at)
        found = _Choice(others[at], strength, chosen)
        best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), found, best)
        return best, (state, evidence)

    first = _Choice(-jnp.inf * every[0, 0], strengths[0], jnp.asarray(num_iterations))
    best, fits = jax.lax.scan(attempt, first, jnp.arange(len(strengths) + 1))
    state, evidence = jax.tree.map(lambda leaf: leaf[-1], fits)
    return state, evidence, best.strength


def _initial_variance(observed: _Observed, mean: jax.Array | None = None) -> jax.Array:
    """Return the variance of isotropic events that explains the mean square of the residuals."""

    def squares(seen: _Observations) -> tuple[jax.Array, ...]:
        operator, residual, _, num_values = seen
        if mean is not None:
            residual = residual - einsum("nmd,d->nm", operator, mean)
        return jnp.square(residual).sum(), num_values.sum(), jnp.square(operator).sum()

    total, noise, gain = observed.sum(squares)
    signal = jnp.maximum(total - noise, 0.01 * noise)  # some, even if noise dominates
    return jnp.where(gain > 0, signal / jnp.where(gain > 0, gain, 1), 1)


def _start_full(observed: _Observed, size: int, dtype: DTypeLike) -> _Full:
    def products(seen: _Observations) -> tuple[jax.Array, jax.Array]:
        operator, residual, *_ = seen
        gram = einsum("nmi,nmj->ij", operator, operator)
        return gram, einsum("nmd,nm->d", operator, residual)

    gram, back = observed.sum(products)
    # Poorly observed directions are left to the iterations.
    inverse = jnp.linalg.pinv(gram, rtol=jnp.finfo(dtype).eps ** 0.5, hermitian=True)
    mean = einsum("ij,j->i", inverse, back)
    # Residuals are centered: else the covariance would be a small difference of large squares.
    deviation = jnp.sqrt(_initial_variance(observed, mean))
    return _Full(mean, deviation * jnp.eye(size, dtype=dtype))


def _start_factors(observed: _Observed, size: int, rank: int, dtype: DTypeLike) -> _Factors:
    # EM cannot leave factors of zero; random ones take half of the variance. They only have to be
    # in general position, so that a constant key is enough.
    scale = jnp.sqrt(_initial_variance(observed))
    factor = jax.random.normal(jax.random.key(0), (size, rank), dtype)
    half = jnp.full(size, 0.5**0.5, dtype)
    return _Factors(jnp.zeros(size, dtype), scale * half, scale * factor * (0.5 / rank) ** 0.5)


def _posterior(gain: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return :math:`W`, the means of the white coordinates and the log-evidence."""
    num, m, size = gain.shape
    identity = jnp.broadcast_to(jnp.eye(m, dtype=gain.dtype), (num, m, m))
    q, r = by_matrix(jnp.linalg.qr, jnp.concatenate([gain.mT, identity], axis=1))
    t = einsum("nij,ni->nj", q[:, size:], residual)
    logdet = 2 * jnp.log(jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1))).sum(-1)
    w = q[:, :size].mT
    return w, einsum("nmi,nm->ni", w, t), -0.5 * (jnp.square(t).sum(-1) + logdet)


def _expect_full(
    state: _Full, seen: _Observations, used: jax.Array
) -> tuple[jax.Array, _FullMoments]:
    """Return the log-evidence of each event, and the sum of the moments of those in use."""
    residual = seen.residual - einsum("nmd,d->nm", seen.operator, state.mean)
    gain = einsum("nmd,dk->nmk", seen.operator, state.root)
    w, mean, log_evidence = _posterior(gain, residual)
    w, mean = w * used[:, None, None], mean * used[:, None]
    excess = einsum("ni,nj->ij", mean, mean) - einsum("nmi,nmj->ij", w, w)
    return log_evidence + seen.constant, _FullMoments(mean.sum(0), excess)


def _maximize_full(
    state: _Full, moments: _FullMoments, weight: jax.Array, event_shape: tuple[int, ...]
) -> _Full:
    """Return the Gaussian of these moments, shrunk with the weight of the target."""
    excess = moments.excess - jnp.outer(moments.mean, moments.mean)
    # The square root is updated by a factor, so that small variances keep their digits.
    eigenvalues, eigenvectors = jnp.linalg.eigh(excess + jnp.eye(len(excess), dtype=excess.dtype))
    root = einsum("dk,ki->di", state.root, eigenvectors) * jnp.sqrt(jnp.maximum(eigenvalues, 0))
    shrink = partial(shrink_correlations, event_shape=event_shape)
    root = jax.lax.cond(weight > 0, shrink, lambda root, _: root, root, weight)
    return _Full(state.mean + einsum("dk,k->d", state.root, moments.mean), root)


def _expect_factors(state: _Factors, seen: _Observations) -> tuple[jax.Array, _FactorMoments]:
    residual = seen.residual - einsum("nmd,d->nm", seen.operator, state.mean)
    own = seen.operator * state.scale
    shared = einsum("nmd,dr->nmr", seen.operator, state.factor)
    w, mean, log_evidence = _posterior(jnp.concatenate([own, shared], axis=-1), residual)
    size = state.scale.size
    e, z, w_e, w_z = mean[:, :size], mean[:, size:], w[..., :size], w[..., size:]
    moments = _FactorMoments(
        e=e.sum(0),
        z=z.sum(0),
        ee=jnp.square(e).sum(0) - jnp.square(w_e).sum((0, 1)),
        ez=einsum("nd,nr->dr", e, z) - einsum("nmd,nmr->dr", w_e, w_z),
        zz=einsum("nr,ns->rs", z, z) - einsum("nmr,nms->rs", w_z, w_z),
    )
    return log_evidence + seen.constant, moments


def _expect_elementwise(state: _Factors, seen: _Observations) -> tuple[jax.Array, _FactorMoments]:
    r"""Return what `_expect_factors` does, for diagonal operators :math:`a`.

    Given :math:`z` the elements are independent: with :math:`c = 1 + a^2 D`,
    :math:`G = a F / \sqrt{c}` and :math:`\rho = (r - a \mu) / \sqrt{c}`, the factors have the
    posterior covariance :math:`P^{-1} = (I + G^T G)^{-1}` and mean :math:`P^{-1} G^T \rho`.
    """
    own = seen.operator * state.scale
    c = 1 + jnp.square(own)
    share = own / jnp.sqrt(c)
    loading = (seen.operator / jnp.sqrt(c))[..., None] * state.factor
    rho = (seen.residual - seen.operator * state.mean) / jnp.sqrt(c)

    gram = einsum("ndr,nds->nrs", loading, loading)
    # A jitter on the diagonal keeps the matrix positive definite under rounding.
    ridge = 1 + jnp.finfo(c.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)
    identity = jnp.eye(gram.shape[-1], dtype=c.dtype)
    chol = cholesky(gram + ridge[:, None, None] * identity)
    inverse = inverse_lower(chol)
    cov_z = einsum("nri,nrj->nij", inverse, inverse)
    cov_load = einsum("ndr,nrs->nds", loading, cov_z)
    z = einsum("ndr,nd->nr", cov_load, rho)
    rest = rho - einsum("ndr,nr->nd", loading, z)
    e = share * rest

    quadratic = jnp.square(rest).sum(-1) + jnp.square(z).sum(-1)
    logdet = jnp.log(c).sum(-1) + 2 * jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)).sum(-1)
    explained = 1 - (cov_load * loading).sum(-1)
    moments = _FactorMoments(
        e=e.sum(0),
        z=z.sum(0),
        ee=(jnp.square(e) - jnp.square(share) * explained).sum(0),
        ez=einsum("nd,nr->dr", e, z) - einsum("nd,ndr->dr", share, cov_load),
        zz=einsum("nr,ns->rs", z, z) + (cov_z - identity).sum(0),
    )
    return seen.constant - 0.5 * (quadratic + logdet), moments


def _maximize_factors(state: _Factors, moments: _FactorMoments) -> _Factors:
    """Regress the elements' own parts on the factors; the rest is their variance."""
    e, z, ee, ez, zz = moments
    cov_z = zz - jnp.outer(z, z) + jnp.eye(z.size, dtype=z.dtype)
    cov_ez = ez - jnp.outer(e, z)
    slope = jnp.linalg.solve(cov_z, cov_ez.T).T
    # Parameter expansion: factors that came out with another covariance than I are redefined.
    factor = state.factor + state.scale[:, None] * slope
    variance = 1 + ee - jnp.square(e) - (slope * cov_ez).sum(-1)
    return _Factors(
        state.mean + state.scale * e + einsum("dr,r->d", state.factor, z),
        state.scale * jnp.sqrt(jnp.maximum(variance, jnp.finfo(e.dtype).eps)),
        einsum("dr,rs->ds", factor, jnp.linalg.cholesky(cov_z)),
    )


def _covariance(state: _Full | _Factors) -> Covariance:
    if isinstance(state, _Full):
        eigenvectors, roots, _ = jnp.linalg.svd(state.root)
        return Dense(jnp.square(roots), eigenvectors)
    # A floor on the diagonal: with the factors alone, solves would be ill-conditioned.
    smallest = jnp.finfo(state.scale.dtype).eps ** 0.5 * jnp.square(state.factor).sum(-1)
    return DiagonalPlusLowRank(jnp.maximum(jnp.square(state.scale), smallest), state.factor)
