r"""Denoisers: the conditional mean :math:`D(x_t, \sigma) = E[x \mid x_t]` that defines a prior.

The package uses the variance-exploding convention,
:math:`x_t = x + \sigma \varepsilon` with :math:`\varepsilon \sim \mathcal{N}(0, I)`. A denoiser
determines the prior's score, :math:`\nabla \log p(x_t) = (D(x_t, \sigma) - x_t) / \sigma^2`
(Tweedie's formula).

Every denoiser has a Gaussian summary of its prior, ``mean`` and ``cov``. The summary sets the
location and scale of the preconditioning, the range of noise levels and the Gaussian covariance of
guidance; the elements of one event should share a unit.

A denoiser works in its own ``unit`` :math:`u`: it takes an event :math:`x` of the data as
:math:`x / u`, and its mean, covariance and noise levels are in that unit. A unit near the scale of
the events keeps squares within the range of the floating type; in float32 the square of 1e-26
underflows. `DiffusionPrior` always uses the data's units.

Exact denoisers are in `numpyro_diffprior.denoisers.exact`, learned ones in
`numpyro_diffprior.denoisers.network`.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import fields
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import ArrayLike

from numpyro_diffprior.linalg.covariances import Covariance, Dense
from numpyro_diffprior.linalg.powers import floor_log2, scale_by_power

__all__ = [
    "Denoiser",
    "align",
    "as_covariance",
    "as_floating",
    "as_gaussian",
    "as_unit",
    "check_size",
    "choose_unit",
    "flatten_events",
    "register",
]

_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Register a dataclass as a pytree; fields with the metadata ``static`` are no data.

    JAX rebuilds pytrees with leaves that are not arrays, so that it must not call ``__init__``.
    """
    static = [spec.name for spec in fields(cls) if spec.metadata.get("static", False)]
    names = [spec.name for spec in fields(cls) if spec.name not in static]

    def flatten(
        denoiser: object,
    ) -> tuple[list[tuple[GetAttrKey, object]], tuple[Hashable, ...]]:
        values = vars(denoiser)
        children = [(GetAttrKey(name), values[name]) for name in names]
        return children, tuple(values[name] for name in static)

    def unflatten(aux: tuple[Hashable, ...], children: Iterable[object]) -> object:
        denoiser: Any = object.__new__(cls)
        vars(denoiser).update(zip(names, children, strict=True))
        vars(denoiser).update(zip(static, aux, strict=True))
        return denoiser

    register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class Denoiser(ABC):
    r"""A prior over events of shape ``event_shape``, given by its conditional mean.

    Attributes:
        mean: The prior's mean (or an estimate), with shape ``event_shape``.
        cov: The prior's covariance (or an estimate), over flattened events.
        unit: The denoiser's unit in units of the data, a positive scalar (default: one).
    """

    mean: jax.Array
    cov: Covariance
    unit: jax.Array | float = 1.0

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """The shape of a context that the denoiser expects (`ConditionedDenoiser`), or None."""
        return None

    def initial_mean(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the mean of the samplers' initial Gaussian, with shape ``(*batch, *event)``."""
        return jnp.broadcast_to(self.mean, (*batch_shape, *self.event_shape))

    def contexts(self, batch_shape: tuple[int, ...]) -> jax.Array | None:
        """Return the contexts of a batch of ``n`` events, ``(n, *context_shape)``, or None."""
        return None

    def at_contexts(self, contexts: jax.Array | None) -> "Denoiser":
        """Return the denoiser at the given contexts."""
        return self

    @abstractmethod
    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        r"""Return :math:`E[x \mid x_t]`.

        Args:
            x_t: Noisy events, with shape ``(*batch, *event)``.
            sigma: Noise levels, broadcastable to shape ``(*batch,)``.
        """

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one event."""
        return jnp.shape(self.mean)

    @property
    def event_size(self) -> int:
        """The number of elements of one event."""
        return prod(self.event_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating type of the prior."""
        return jnp.result_type(self.mean)

    @property
    def scale(self) -> jax.Array:
        """The square root of the mean variance of an element, a scalar."""
        return jnp.sqrt(self.cov.trace() / self.event_size)

    @property
    def sigma_min(self) -> jax.Array:
        """The noise level at which sampling stops: a thousandth of the scale.

        Samplers return the conditional mean at this level. The draws of an element are therefore
        too narrow if its standard deviation is less than about ten times this level.
        """
        return 1e-3 * self.scale

    @property
    def sigma_max(self) -> jax.Array:
        """The noise level at which sampling starts: ten times the largest standard deviation."""
        return 10.0 * jnp.sqrt(self.cov.max_eigenvalue())

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        r"""Return the denoiser's mean squared error over that of its Gaussian summary.

        .. math:: E \lVert x - D(x_t, \sigma) \rVert^2 / \mathrm{tr}(V), \quad
            V = (\Sigma_x^{-1} + I / \sigma^2)^{-1}

        The ratio is below one if the prior is more informative than its Gaussian summary, as for
        images. It is one for a denoiser without a measured error.

        Args:
            sigma: Noise levels of any shape; the result has the same shape.
        """
        return jnp.ones_like(jnp.asarray(sigma, self.dtype))

    def to_data(self, x: jax.Array) -> jax.Array:
        """Convert events or noise levels from the denoiser's unit to the data's units."""
        mantissa, exponent = self._split_unit(x)
        return scale_by_power(mantissa * x, exponent)

    def from_data(self, x: jax.Array) -> jax.Array:
        """Convert events or noise levels from the data's units to the denoiser's unit."""
        mantissa, exponent = self._split_unit(x)
        return scale_by_power(x, -exponent) / mantissa

    def _split_unit(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the unit as a mantissa in [1, 2) and an exponent of two."""
        unit = jnp.asarray(self.unit)
        # A denoiser returned by `jax.vmap` has a unit with leading axes, like its events.
        unit = unit.reshape(*unit.shape, *(1,) * (x.ndim - unit.ndim))
        exponent = floor_log2(unit)
        return scale_by_power(unit, -exponent), exponent

    def in_unit(self, unit: jax.Array) -> "Denoiser":
        """Return the same prior with another unit.

        Raises:
            ValueError: If the unit of this denoiser cannot be changed.
        """
        raise ValueError(
            f"{type(self).__name__}: its mean and covariance are too small or too large for "
            f"{self.dtype}; state it in a `unit` near its scale."
        )

    def score(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        r"""Return :math:`\nabla_{x_t} \log p(x_t)` (Tweedie), shaped as ``x_t``."""
        sigma = jnp.asarray(sigma, self.dtype)
        return (self(x_t, sigma) - x_t) / align(sigma, self.event_shape) ** 2


def flatten_events(x: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
    """Reshape events to vectors: from ``(*batch, *event)`` to ``(*batch, d)``."""
    return x.reshape(*x.shape[: x.ndim - len(event_shape)], -1)


def align(sigma: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
    """Append one axis of length one to ``sigma`` for each axis of an event."""
    return sigma.reshape(*sigma.shape, *(1,) * len(event_shape))


def as_floating(x: ArrayLike) -> jax.Array:
    """Return a floating array: integers are cast to the default floating type."""
    x = jnp.asarray(x)
    return x.astype(jnp.result_type(float, x))


def as_covariance(name: str, cov: Covariance | ArrayLike, dtype: jnp.dtype) -> Covariance:
    """Convert a `Covariance`, or matrices ``(*batch, d, d)``, to a `Covariance` of this dtype.

    Raises:
        ValueError: If matrices are not square, symmetric and positive semi-definite, or the
            parameters of a `Covariance` are not valid.
    """
    if isinstance(cov, Covariance):
        converted: Covariance = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), cov)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(converted)):
            converted.check(name)
        return converted
    matrix = jnp.asarray(cov, dtype)
    if not isinstance(matrix, jax.core.Tracer):
        _check_matrix(name, np.asarray(matrix, np.float64))
    return Dense.from_matrix(matrix)


def _check_matrix(name: str, matrix: np.ndarray) -> None:
    """Raise if a finite matrix is not a covariance; the prior checks that values are finite."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not np.isfinite(matrix).all():
        return
    largest = np.abs(matrix).max(initial=0)
    transposed = np.swapaxes(matrix, -1, -2)
    if not np.allclose(matrix, transposed, rtol=1e-3, atol=1e-4 * largest):
        raise ValueError(
            f"{name}: expected a symmetric covariance matrix, got one that differs from its "
            f"transpose by {np.abs(matrix - transposed).max():.3g}; symmetrize it: "
            "(cov + cov.T) / 2."
        )
    smallest = np.linalg.eigvalsh((matrix + transposed) / 2).min()
    if smallest < -1e-4 * largest:
        raise ValueError(
            f"{name}: expected a positive semi-definite covariance matrix, got one with the "
            f"eigenvalue {smallest:.3g}."
        )


def as_gaussian(
    denoiser: Denoiser, mean: ArrayLike, cov: Covariance | ArrayLike, unit: ArrayLike
) -> dict[str, Any]:
    """Check mean, covariance and unit of a denoiser, and cast them to the dtype of the mean.

    Raises:
        ValueError: If the sizes of mean and covariance differ, the covariance is not valid, or
            the unit is not a positive number.
    """
    mean = as_floating(mean)
    if mean.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{type(denoiser).__name__}: expected a mean of type float32 or float64, got "
            f"{mean.dtype}; only the network inside may use half precision."
        )
    cov = as_covariance(type(denoiser).__name__, cov, mean.dtype)
    check_size(type(denoiser).__name__, mean.shape, cov)
    return {"mean": mean, "cov": cov, "unit": as_unit(type(denoiser).__name__, unit, mean.dtype)}


def as_unit(name: str, unit: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Return a unit as a scalar array.

    Raises:
        ValueError: If it is not a positive number.
    """
    value = jnp.asarray(unit, dtype)
    if value.ndim or (not isinstance(value, jax.core.Tracer) and not 0 < float(value) < np.inf):
        raise ValueError(
            f"{name}: expected a unit that is a positive number, within the range of {dtype}, got "
            f"{unit!r}."
        )
    return value


def choose_unit(scale: jax.Array, unit: jax.Array | float) -> jax.Array:
    """Return a unit that is within a factor of 1,024 of the scale of the events.

    Args:
        scale: The standard deviation of the events in the data's units, a positive scalar.
        unit: The current unit.

    Returns:
        The current unit if it is close enough, else the power of two nearest to the scale.
    """
    exponent = jnp.round(jnp.log2(scale)).astype(int)
    nearest = jnp.ldexp(jnp.ones_like(scale), exponent)
    distance = jnp.abs(jnp.log2(scale) - jnp.log2(unit))
    return jnp.where(jnp.isfinite(distance) & (distance > 10), nearest, unit)


def check_size(name: str, event_shape: tuple[int, ...], cov: Covariance) -> None:
    """Raise a `ValueError` if the sizes of covariance and events differ."""
    size = prod(event_shape)
    if cov.size != size:
        raise ValueError(
            f"{name}: events of shape {event_shape} need a covariance of size {size}, "
            f"got one of size {cov.size}."
        )
