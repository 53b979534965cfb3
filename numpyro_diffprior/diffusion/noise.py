r"""Schedules of noise levels for samplers, and distributions of noise levels for training.

A sampler visits a decreasing grid :math:`\sigma_0 = \sigma_{max} > \dots > \sigma_{T-1} =
\sigma_{min}`, made by a `Schedule`. Training draws the noise level of every event of a minibatch
from a `NoiseDistribution`, which is defined by its quantile function. The quantile function is
applied to independent uniforms, or to one uniform per stratum (the same marginals, and less
variance in the gradient).

References:
    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative
    models* (EDM), 2022, arXiv 2206.00364.

    Rozet, Andry, Lanusse, Louppe, *Learning diffusion priors from observations by expectation
    maximization*, 2024, arXiv 2405.13712.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffprior._compile.checks import check_count, check_number, set_fields

__all__ = [
    "Karras",
    "LogBeta",
    "LogLinear",
    "LogNormal",
    "LogUniform",
    "NoiseDistribution",
    "Schedule",
]

_TABLE_SIZE = 2049


class Schedule(ABC):
    """A spacing of noise levels between `sigma_min` and `sigma_max`.

    A subclass must be hashable and compared by value, like a frozen dataclass, because it is part
    of a sampler, which is static under ``jax.jit``. To be an argument of ``jax.jit`` itself, it
    must also be a pytree (``jax.tree_util.register_static``).
    """

    @abstractmethod
    def __call__(self, num_steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike) -> jax.Array:
        """Make a grid of noise levels.

        Args:
            num_steps: Number of levels, at least one. A single level is `sigma_max`.
            sigma_min: Smallest noise level, a positive scalar.
            sigma_max: Largest noise level, a scalar above `sigma_min`.

        Returns:
            The levels, decreasing from `sigma_max` to `sigma_min`, with shape ``(num_steps,)``.

        Raises:
            ValueError: If `num_steps` is below one.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogLinear(Schedule):
    r"""Levels in geometric progression.

    .. math:: \sigma_i = \sigma_{max} (\sigma_{min} / \sigma_{max})^{i / (T - 1)}
    """

    def __call__(self, num_steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike) -> jax.Array:
        low, high, t = _grid(num_steps, sigma_min, sigma_max)
        return high * (low / high) ** t


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Karras(Schedule):
    r"""Levels equally spaced in :math:`\sigma^{1/\rho}` (EDM, equation 5).

    .. math:: \sigma_i = \left( \sigma_{max}^{1/\rho} + \frac{i}{T - 1}
        (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho}) \right)^\rho

    Args:
        rho: Positive exponent. Larger values put more levels near `sigma_min`; the limit of large
            `rho` is `LogLinear`.

    Raises:
        ValueError: If `rho` is not positive.
    """

    rho: float = field(default=7.0, metadata={"static": True})

    def __post_init__(self) -> None:
        set_fields(self, rho=check_number("Karras", "rho", self.rho))

    def __call__(self, num_steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike) -> jax.Array:
        low, high, t = _grid(num_steps, sigma_min, sigma_max)
        # Relative to the largest level: the first level is then exactly `sigma_max`.
        ratio = (low / high) ** (1 / self.rho)
        return high * (1 + t * (ratio - 1)) ** self.rho


class NoiseDistribution(ABC):
    """A distribution of noise levels between `sigma_min` and `sigma_max`.

    A subclass must be a pytree, because it is an argument of the compiled training loop. A frozen
    dataclass, for example, can be registered by ``jax.tree_util.register_static``, or by
    ``register_dataclass`` with ``stratified`` marked static.
    """

    stratified: bool

    @abstractmethod
    def quantile(
        self, u: jax.Array, *, sigma_min: ArrayLike, sigma_max: ArrayLike, scale: ArrayLike
    ) -> jax.Array:
        """Map probabilities to noise levels.

        Args:
            u: Probabilities in [0, 1], of any shape.
            sigma_min: Smallest noise level, a positive scalar.
            sigma_max: Largest noise level, a scalar above `sigma_min`.
            scale: Standard deviation of one dimension of the data, a positive scalar.

        Returns:
            The noise levels below which a fraction `u` of the draws lies, with `u`'s shape.
        """

    def sample(
        self,
        rng_key: jax.Array,
        num: int,
        *,
        sigma_min: ArrayLike,
        sigma_max: ArrayLike,
        scale: ArrayLike,
    ) -> jax.Array:
        """Draw noise levels.

        Args:
            rng_key: Random key.
            num: Number of draws.
            sigma_min: Smallest noise level, a positive scalar.
            sigma_max: Largest noise level, a scalar above `sigma_min`.
            scale: Standard deviation of one dimension of the data, a positive scalar.

        Returns:
            Noise levels with shape ``(num,)``. Independent draws, or, if the distribution is
            stratified, one draw from each of `num` strata of equal probability, in random order.
        """
        dtype = jnp.result_type(float, sigma_min, sigma_max)
        key_uniform, key_order = jax.random.split(rng_key)
        u = jax.random.uniform(key_uniform, (num,), dtype)
        if self.stratified:
            u = jax.random.permutation(key_order, (jnp.arange(num, dtype=dtype) + u) / num)
        return self.quantile(u, sigma_min=sigma_min, sigma_max=sigma_max, scale=scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogBeta(NoiseDistribution):
    r"""A beta distribution of the logarithm of the noise level, as in Rozet et al. (2024).

    .. math:: \sigma = \sigma_{min}^{1 - t} \sigma_{max}^t, \quad
        t \sim \mathrm{Beta}(\alpha, \beta)

    Args:
        alpha: First shape parameter; larger values put more draws near `sigma_max`.
        beta: Second shape parameter; larger values put more draws near `sigma_min`.
        stratified: Whether `sample` draws once from each of equally probable strata.

    Raises:
        ValueError: If a parameter is not positive.
    """

    alpha: float = field(default=3.0, metadata={"static": True})
    beta: float = field(default=3.0, metadata={"static": True})
    stratified: bool = field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        set_fields(
            self,
            alpha=check_number("LogBeta", "alpha", self.alpha),
            beta=check_number("LogBeta", "beta", self.beta),
        )

    def quantile(
        self, u: jax.Array, *, sigma_min: ArrayLike, sigma_max: ArrayLike, scale: ArrayLike
    ) -> jax.Array:
        """See `NoiseDistribution.quantile`; accurate to 1e-6 in ``t``, less in the tails."""
        # JAX has no inverse of the incomplete beta function. The inverse of a tabulated CDF is
        # cheap, monotone, and off by less than a cell of the table where the density vanishes.
        with jax.ensure_compile_time_eval():
            grid = jnp.linspace(0, 1, _TABLE_SIZE, dtype=u.dtype)
            table = jax.scipy.special.betainc(self.alpha, self.beta, grid)
        t = jnp.interp(u, table, grid)
        return _log_interpolate(t, sigma_min, sigma_max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    r"""A log-normal distribution relative to the data's scale, as in EDM.

    .. math:: \ln(\sigma / s) \sim N(\mu, \tau^2)

    clipped to the range of noise levels, where :math:`s` is the data's scale. The default mean is
    that of EDM: :math:`-1.2 - \ln 0.5`, for a mean of -1.2 at :math:`s = 0.5`.

    Args:
        mean: Mean of the logarithm.
        std: Standard deviation of the logarithm.
        stratified: Whether `sample` draws once from each of equally probable strata.

    Raises:
        ValueError: If `std` is not positive.
    """

    mean: float = field(default=-0.5, metadata={"static": True})
    std: float = field(default=1.2, metadata={"static": True})
    stratified: bool = field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        mean = check_number("LogNormal", "mean", self.mean, -math.inf)
        set_fields(self, mean=mean, std=check_number("LogNormal", "std", self.std))

    def quantile(
        self, u: jax.Array, *, sigma_min: ArrayLike, sigma_max: ArrayLike, scale: ArrayLike
    ) -> jax.Array:
        sigma = scale * jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(u))
        return jnp.clip(sigma, sigma_min, sigma_max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogUniform(NoiseDistribution):
    r"""A log-uniform distribution, :math:`\sigma = \sigma_{min}^{1 - u} \sigma_{max}^u`.

    Args:
        stratified: Whether `sample` draws once from each of equally probable strata.
    """

    stratified: bool = field(default=True, metadata={"static": True})

    def quantile(
        self, u: jax.Array, *, sigma_min: ArrayLike, sigma_max: ArrayLike, scale: ArrayLike
    ) -> jax.Array:
        return _log_interpolate(u, sigma_min, sigma_max)


def _grid(
    num_steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return both ends as arrays, and the positions of the levels between them, from 0 to 1."""
    num_steps = check_count("Schedule", "num_steps", num_steps)
    dtype = jnp.result_type(float, sigma_min, sigma_max)
    t = jnp.linspace(0, 1, num_steps, dtype=dtype)
    return jnp.asarray(sigma_min, dtype), jnp.asarray(sigma_max, dtype), t


def _log_interpolate(t: jax.Array, sigma_min: ArrayLike, sigma_max: ArrayLike) -> jax.Array:
    low, high = jnp.log(sigma_min), jnp.log(sigma_max)
    # Clipped, because rounding may leave the range by an ulp.
    return jnp.clip(jnp.exp(low + t * (high - low)), sigma_min, sigma_max)
