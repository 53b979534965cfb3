r"""Denoisers: the conditional mean :math:`D(x_t, \sigma) = E[x \mid x_t]` that defines a prior.

One convention everywhere: variance exploding,
:math:`x_t = x + \sigma \varepsilon` with :math:`\varepsilon \sim \mathcal{N}(0, I)`. A denoiser
is the prior: its score is :math:`\nabla \log p(x_t) = (D(x_t, \sigma) - x_t) / \sigma^2`
(Tweedie's formula).

Every denoiser carries a Gaussian summary of its prior, ``mean`` and ``cov``. It sets the location
and scale of the preconditioning, the range of noise levels and the Gaussian covariance of
guidance, so that users never rescale their units; the elements of one event should share a unit.

The exact denoisers of Gaussians and of their mixtures are here; learned ones are in
`numpyro_diffprior.network_denoiser`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import ArrayLike

from numpyro_diffprior.linalg import Covariance, Dense
from numpyro_diffprior.matrices import einsum

__all__ = [
    "ConditionedDenoiser",
    "Denoiser",
    "GaussianDenoiser",
    "MixtureDenoiser",
    "align",
    "as_gaussian",
    "flatten_events",
    "register",
    "set_attributes",
]

_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Make a dataclass a pytree, rebuilt without ``__init__``: its leaves may be any objects."""
    names = [spec.name for spec in fields(cls)]

    def flatten(denoiser: object) -> tuple[list[tuple[GetAttrKey, object]], None]:
        values = vars(denoiser)
        return [(GetAttrKey(name), values[name]) for name in names], None

    def unflatten(_: None, children: Iterable[object]) -> object:
        denoiser: Any = object.__new__(cls)
        vars(denoiser).update(zip(names, children, strict=True))
        return denoiser

    register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class Denoiser(ABC):
    """A prior over events of shape ``event_shape``, given by its conditional mean.

    Attributes:
        mean: The prior's mean (or the best guess at it), with shape ``event_shape``.
        cov: The prior's covariance, over flattened events.
    """

    mean: jax.Array
    cov: Covariance

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """The shape of a context that the denoiser waits for (see `condition`), or None."""
        return None

    def condition(self, context: ArrayLike) -> "ConditionedDenoiser":
        """Return the denoiser of the prior given a context: a label, a redshift.

        Args:
            context: Contexts, with shape ``(*batch, *context_shape)``; their batch axes go with
                the last ones of the events'.

        Raises:
            ValueError: If the denoiser waits for no context, or one of another shape.
        """
        shape = self.context_shape
        if shape is None:
            raise ValueError(
                f"{type(self).__name__}: expected a denoiser that waits for a context; give its "
                "network a `context_shape`, as in MLP((2,), context_shape=(3,), rngs=rngs)."
            )
        context = jnp.asarray(context, self.dtype)
        if context.shape[max(context.ndim - len(shape), 0) :] != shape:
            raise ValueError(
                f"{type(self).__name__}: expected contexts of shape {shape} in the last axes, got "
                f"an array of shape {context.shape}."
            )
        return ConditionedDenoiser(self, context)

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return where the prior lies, seen from the highest noise level: ``(*batch, *event)``."""
        return jnp.broadcast_to(self.mean, (*batch_shape, *self.event_shape))

    def contexts(self, batch_shape: tuple[int, ...]) -> jax.Array | None:
        """Return the contexts of a batch of events, ``(n, *context_shape)``, or None."""
        return None

    def at(self, contexts: jax.Array | None) -> "Denoiser":
        """Return the denoiser at others of its `contexts`."""
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
        """The root-mean-square deviation of an element, in the data's units."""
        return jnp.sqrt(self.cov.trace() / self.event_size)

    @property
    def sigma_min(self) -> jax.Array:
        """The noise level at which sampling stops: a thousandth of the scale.

        Draws end on the conditional mean there, too narrow in elements that vary less than about
        ten times as much.
        """
        return 1e-3 * self.scale

    @property
    def sigma_max(self) -> jax.Array:
        """The noise level at which sampling starts: ten times the widest direction's deviation."""
        return 10.0 * jnp.sqrt(self.cov.max_eigenvalue())

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        r"""Return the denoiser's mean squared error over that of its Gaussian summary.

        .. math:: E \lVert x - D(x_t, \sigma) \rVert^2 / \mathrm{tr}(V), \quad
            V = (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}

        The better the prior is known, the less is left: an image is found in noise in which a
        Gaussian only finds its smooth part. One for a denoiser of which no error was measured.

        Args:
            sigma: Noise levels, of any shape, which is the result's.
        """
        return jnp.ones_like(jnp.asarray(sigma, self.dtype))

    def score(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        r"""Return :math:`\nabla_{x_t} \log p(x_t)` (Tweedie), shaped as ``x_t``."""
        sigma = jnp.asarray(sigma, self.dtype)
        return (self(x_t, sigma) - x_t) / align(sigma, self.event_shape) ** 2


@register
@dataclass(frozen=True, eq=False, init=False)
class GaussianDenoiser(Denoiser):
    r"""The exact denoiser of :math:`\mathcal{N}(\mu, \Sigma)`.

    .. math:: D(x_t, \sigma) = \mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (x_t - \mu)

    Args:
        mean: The mean, with shape ``event_shape``.
        cov: A `Covariance` over flattened events, or a matrix.

    Raises:
        ValueError: If the sizes of mean and covariance differ.
    """

    mean: jax.Array
    cov: Covariance

    def __init__(self, mean: ArrayLike, cov: Covariance | ArrayLike) -> None:
        set_attributes(self, **as_gaussian(self, mean, cov))

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        variance = jnp.asarray(sigma, self.dtype) ** 2
        deviation = flatten_events(x_t - self.mean, self.event_shape)
        # V / sigma^2, with V the conditional covariance, is the same matrix and needs no solve.
        shrunk = self.cov.harmonic(variance).matvec(deviation) / variance[..., None]
        return self.mean + shrunk.reshape(x_t.shape)


@register
@dataclass(frozen=True, eq=False, init=False)
class MixtureDenoiser(Denoiser):
    r"""The exact denoiser of a Gaussian mixture, an oracle for multimodal problems.

    .. math:: D(x_t, \sigma) = \sum_k p(k \mid x_t) \, E_k[x \mid x_t], \quad
        p(k \mid x_t) \propto w_k \, \mathcal{N}(x_t; \mu_k, \Sigma_k + \sigma^2 I)

    Its Gaussian summary has the mixture's mean and covariance.

    Args:
        weights: Positive weights, with shape ``(k,)``; normalised here.
        means: Components' means, with shape ``(k, *event)``.
        covs: A `Covariance` whose parameters have a leading axis ``k`` (or none: one for all), or
            matrices of shape ``(k, d, d)``.

    Raises:
        ValueError: If the sizes of weights, means and covariances differ.
    """

    weights: jax.Array
    means: jax.Array
    covs: Covariance
    mean: jax.Array = field(init=False)
    cov: Covariance = field(init=False)

    def __init__(self, weights: ArrayLike, means: ArrayLike, covs: Covariance | ArrayLike) -> None:
        weights, means = _floating(weights), _floating(means)
        if weights.ndim != 1 or means.shape[:1] != weights.shape:
            raise ValueError(
                "MixtureDenoiser: expected weights of shape (k,) and means of shape (k, *event), "
                f"got {weights.shape} and {means.shape}."
            )
        num, *event_shape = means.shape
        covs = _covariance(covs, means.dtype)
        _check_size("MixtureDenoiser", tuple(event_shape), covs)
        batch_shape = jnp.shape(covs.trace())
        if batch_shape not in ((), (num,)):
            raise ValueError(
                f"MixtureDenoiser: {num} components need covariances with a leading axis of "
                f"length {num}, or none; got leading axes {batch_shape}."
            )
        weights = (weights / weights.sum()).astype(means.dtype)
        mean = einsum("k,k...->...", weights, means)
        within = jnp.broadcast_to(covs.dense(), (num, covs.size, covs.size))
        between = (means - mean).reshape(num, -1)
        cov = einsum("k,kij->ij", weights, within)
        cov = cov + einsum("k,ki,kj->ij", weights, between, between)
        summary = {"mean": mean, "cov": Dense.from_matrix(cov)}
        set_attributes(self, weights=weights, means=means, covs=covs, **summary)

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        variance = jnp.asarray(sigma, self.dtype)[..., None] ** 2
        means = flatten_events(self.means, self.event_shape)
        deviation = flatten_events(x_t, self.event_shape)[..., None, :] - means
        noisy = self.covs.shift(variance)
        solution = noisy.solve(deviation)
        log_density = -0.5 * (jnp.sum(deviation * solution, axis=-1) + noisy.logdet())
        posterior = jax.nn.softmax(jnp.log(self.weights) + log_density, axis=-1)
        x_hat = jnp.sum(posterior[..., None] * (means + self.covs.matvec(solution)), axis=-2)
        return x_hat.reshape(x_t.shape)


@register
@dataclass(frozen=True, eq=False)
class ConditionedDenoiser(Denoiser):
    """The denoiser of a conditional prior at given contexts; see `Denoiser.condition`.

    Mean, covariance and errors are those over all contexts.

    Args:
        part: The denoiser that waits for a context.
        context: Contexts, with shape ``(*batch, *context_shape)``.
    """

    part: Denoiser
    context: jax.Array

    def __call__(
        self, x_t: jax.Array, sigma: jax.Array | float, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Return the conditional mean; with ``rngs``, in training mode (dropout)."""
        part: Any = self.part
        batch_shape = x_t.shape[: x_t.ndim - len(self.event_shape)]
        return part(x_t, sigma, self.contexts(batch_shape), rngs=rngs)

    def contexts(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the contexts of a batch of events, ``(n, *context_shape)``."""
        shape = self.context.shape[len(self.batch_shape) :]
        return jnp.broadcast_to(self.context, (*batch_shape, *shape)).reshape(-1, *shape)

    def at(self, contexts: jax.Array | None) -> Denoiser:
        """Return the denoiser at others of its contexts."""
        assert contexts is not None
        return self.part.condition(contexts)

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return self.part.mean

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance."""
        return self.part.cov

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the means given the contexts, which in so much noise is what the network sees."""
        means = self(super().location(self.batch_shape), self.sigma_max)
        return jnp.broadcast_to(means, (*batch_shape, *self.event_shape))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of contexts."""
        ndim = len(self.part.context_shape or ())
        return self.context.shape[: self.context.ndim - ndim]

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Return the ratio over all contexts; see `Denoiser.error_ratio`."""
        return self.part.error_ratio(sigma)


def flatten_events(x: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
    """Return events as vectors: from ``(*batch, *event)`` to ``(*batch, d)``."""
    return x.reshape(*x.shape[: x.ndim - len(event_shape)], -1)


def align(sigma: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
    """Give ``sigma`` one trailing axis for each of the event's."""
    return sigma.reshape(*sigma.shape, *(1,) * len(event_shape))


def _floating(x: ArrayLike) -> jax.Array:
    """Return an array of floating type: its own, or the default for integers."""
    x = jnp.asarray(x)
    return x.astype(jnp.result_type(float, x))


def _covariance(cov: Covariance | ArrayLike, dtype: jnp.dtype) -> Covariance:
    if not isinstance(cov, Covariance):
        return Dense.from_matrix(jnp.asarray(cov, dtype))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), cov)


def as_gaussian(
    denoiser: Denoiser, mean: ArrayLike, cov: Covariance | ArrayLike
) -> dict[str, Any]:
    """Return ``mean`` and ``cov`` of a denoiser, of one floating type: that of the mean.

    Raises:
        ValueError: If the sizes of mean and covariance differ.
    """
    mean = _floating(mean)
    cov = _covariance(cov, mean.dtype)
    _check_size(type(denoiser).__name__, mean.shape, cov)
    return {"mean": mean, "cov": cov}


def _check_size(name: str, event_shape: tuple[int, ...], cov: Covariance) -> None:
    size = prod(event_shape)
    if cov.size != size:
        raise ValueError(
            f"{name}: events of shape {event_shape} need a covariance of size {size}, "
            f"got one of size {cov.size}."
        )


def set_attributes(denoiser: Denoiser, **attributes: Any) -> None:
    """Set attributes of a frozen dataclass, in its ``__init__``."""
    for name, value in attributes.items():
        object.__setattr__(denoiser, name, value)
