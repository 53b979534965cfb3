r"""Denoisers: the conditional mean :math:`D(x_t, \sigma) = E[x \mid x_t]` that defines a prior.

One convention everywhere: variance exploding,
:math:`x_t = x + \sigma \varepsilon` with :math:`\varepsilon \sim \mathcal{N}(0, I)`. A denoiser
is the prior: its score is :math:`\nabla \log p(x_t) = (D(x_t, \sigma) - x_t) / \sigma^2`
(Tweedie's formula).

Every denoiser carries a Gaussian summary of its prior, ``mean`` and ``cov``. It sets the location
and scale of the preconditioning, the range of noise levels and the Gaussian covariance of
guidance, so that users never rescale their units.

References:
    Karras et al., *Elucidating the design space of diffusion-based generative models* (EDM),
    NeurIPS 2022, arXiv 2206.00364.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import ArrayLike

from numpyro_diffprior.linalg import Blocks, Covariance, Dense, Isotropic, Repeated

__all__ = [
    "ConditionedDenoiser",
    "Denoiser",
    "GaussianDenoiser",
    "MixtureDenoiser",
    "Network",
    "NetworkDenoiser",
    "PlateDenoiser",
    "ProductDenoiser",
]


class Network(Protocol):
    """What `NetworkDenoiser` needs of a network; `numpyro_diffprior.nets` has two.

    A network with an attribute ``context_shape`` that is not None is called with contexts as third
    argument, of shape ``(batch, *context_shape)``.
    """

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one event."""
        ...

    def __call__(
        self, x: jax.Array, noise: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Map ``x`` of shape ``(batch, *event)``; ``noise`` has shape ``(batch,)`` or ``(1,)``."""
        ...


_Class = TypeVar("_Class", bound=type)


def _register(cls: _Class) -> _Class:
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
        """The noise level at which sampling stops: a thousandth of the scale."""
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
        return (self(x_t, sigma) - x_t) / _align(sigma, self.event_shape) ** 2


@_register
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
        _set(self, **_gaussian(self, mean, cov))

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        variance = jnp.asarray(sigma, self.dtype) ** 2
        deviation = _flatten(x_t - self.mean, self.event_shape)
        # V / sigma^2, with V the conditional covariance, is the same matrix and needs no solve.
        shrunk = self.cov.harmonic(variance).matvec(deviation) / variance[..., None]
        return self.mean + shrunk.reshape(x_t.shape)


@_register
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
        mean = jnp.tensordot(weights, means, axes=1)
        within = jnp.broadcast_to(covs.dense(), (num, covs.size, covs.size))
        between = (means - mean).reshape(num, -1)
        cov = jnp.einsum("k,kij->ij", weights, within)
        cov = cov + jnp.einsum("k,ki,kj->ij", weights, between, between)
        _set(self, weights=weights, means=means, covs=covs, mean=mean, cov=Dense.from_matrix(cov))

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        variance = jnp.asarray(sigma, self.dtype)[..., None] ** 2
        means = _flatten(self.means, self.event_shape)
        deviation = _flatten(x_t, self.event_shape)[..., None, :] - means
        noisy = self.covs.shift(variance)
        solution = noisy.solve(deviation)
        log_density = -0.5 * (jnp.sum(deviation * solution, axis=-1) + noisy.logdet())
        posterior = jax.nn.softmax(jnp.log(self.weights) + log_density, axis=-1)
        x_hat = jnp.sum(posterior[..., None] * (means + self.covs.matvec(solution)), axis=-2)
        return x_hat.reshape(x_t.shape)


@_register
@dataclass(frozen=True, eq=False)
class ProductDenoiser(Denoiser):
    """The denoiser of independent events as one: the sources of a sum, say.

    Its events are vectors: those of the parts one after the other, flattened, each in units of its
    own prior's scale, so that the parts share one sequence of noise levels whatever their units.

    Args:
        parts: The denoisers of the parts.
    """

    parts: tuple[Denoiser, ...]

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        sigma = jnp.asarray(sigma, self.dtype)
        values = zip(self.parts, self.split(x_t), strict=True)
        return self.join([part(x, sigma * part.scale) for part, x in values])

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return self.join([part.mean for part in self.parts])

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance, block diagonal."""
        return Blocks(tuple(part.cov.scale(part.scale**-2) for part in self.parts))

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Average the parts' ratios over the elements; see `Denoiser.error_ratio`."""
        sigma = jnp.asarray(sigma, self.dtype)
        weighted = [part.event_size * part.error_ratio(sigma * part.scale) for part in self.parts]
        return sum(weighted[1:], start=weighted[0]) / self.event_size

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the parts' locations, joined."""
        return self.join([part.location(batch_shape) for part in self.parts])

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return the parts of events, each with shape ``(*batch, *event)`` and in its units."""
        ends = np.cumsum([part.event_size for part in self.parts])[:-1]
        return tuple(
            part.scale * value.reshape(*x.shape[:-1], *part.event_shape)
            for part, value in zip(self.parts, jnp.split(x, ends, axis=-1), strict=True)
        )

    def join(self, values: Sequence[jax.Array]) -> jax.Array:
        """Undo `split`."""
        flat = [
            _flatten(value / part.scale, part.event_shape)
            for part, value in zip(self.parts, values, strict=True)
        ]
        return jnp.concatenate(flat, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PlateDenoiser(Denoiser):
    """The denoiser of a whole plate as one event, where observations couple its elements.

    Args:
        part: The denoiser of an element.
        batch_shape: The shape of the plate.
    """

    part: Denoiser
    batch_shape: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        sigma = jnp.asarray(sigma, self.dtype)
        return self.part(x_t, _align(sigma, self.batch_shape))

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return jnp.broadcast_to(self.part.mean, (*self.batch_shape, *self.part.event_shape))

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance, block diagonal."""
        return Repeated(self.part.cov, prod(self.batch_shape))

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Return the elements' ratio; see `Denoiser.error_ratio`."""
        return self.part.error_ratio(sigma)

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the elements' locations."""
        return self.part.location((*batch_shape, *self.batch_shape))


@_register
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


# Of one size, so that measuring them does not change the shapes of a compiled prior.
_NUM_RATIOS = 32


@_register
@dataclass(frozen=True, eq=False, init=False)
class NetworkDenoiser(Denoiser):
    r"""A learned denoiser: a Gaussian's, corrected by a network.

    .. math:: D(x_t, \sigma) = E_{\mathcal{N}(\mu, \Sigma)}[x \mid x_t]
        + c_{out} F\bigl(c_{in} (x_t - \mu), \tfrac{1}{4} \log \tfrac{\sigma}{s}\bigr), \quad
        c_{out} = \frac{s \sigma}{\sqrt{s^2 + \sigma^2}}, \quad
        c_{in} = \frac{1}{\sqrt{s^2 + \sigma^2}}

    with :math:`s^2` the mean variance of an element. An isotropic :math:`\Sigma = s^2 I` gives
    EDM's preconditioning (Karras et al. 2022, table 1) with location and scale; a fitted
    covariance leaves to the network what is not Gaussian. The networks of this package put out
    zero when new, so that an untrained denoiser is exactly its Gaussian's.

    Args:
        net: A network on ``(batch, *event)``; its parameters are all that is trained.
        mean: The data's mean, with shape ``event_shape`` (default: zero).
        cov: The data's covariance over flattened events, or a matrix (default: the identity).
        base: The Gaussian of the preconditioning (default: that of ``mean`` and ``cov``). It stays
            where it is while ``mean`` and ``cov`` follow the prior, since moving it under a
            trained network would change the prior.
        error_ratios: `error_ratio` at noise levels from `sigma_min` to `sigma_max`, equally spaced
            on the logarithmic axis (default: one); see `numpyro_diffprior.training.measure_error`.

    Raises:
        ValueError: If the shapes of network, mean, covariance and base differ.
    """

    net: Network
    mean: jax.Array
    cov: Covariance
    base: GaussianDenoiser
    error_ratios: jax.Array

    def __init__(
        self,
        net: Network,
        mean: ArrayLike | None = None,
        cov: Covariance | ArrayLike | None = None,
        base: GaussianDenoiser | None = None,
        error_ratios: ArrayLike | None = None,
    ) -> None:
        shape = tuple(net.event_shape)
        summary = _gaussian(
            self,
            jnp.zeros(shape) if mean is None else mean,
            Isotropic(1.0, prod(shape)) if cov is None else cov,
        )
        base = GaussianDenoiser(**summary) if base is None else base
        for name, found in (("mean", summary["mean"].shape), ("base", base.event_shape)):
            if found != shape:
                raise ValueError(
                    f"NetworkDenoiser: the network's events have shape {shape}, "
                    f"those of the {name} have shape {found}."
                )
        dtype = summary["mean"].dtype
        ratios = jnp.ones(_NUM_RATIOS, dtype) if error_ratios is None else error_ratios
        _set(self, net=net, base=base, error_ratios=jnp.asarray(ratios, dtype), **summary)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """The shape of the network's contexts, if it has any."""
        return getattr(self.net, "context_shape", None)

    def __call__(
        self,
        x_t: jax.Array,
        sigma: jax.Array | float,
        context: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Return the conditional mean; with ``rngs``, in training mode (dropout).

        Contexts have shape ``(n, *context_shape)``, one for each of the events in their order.

        Raises:
            ValueError: If the network waits for a context that is not given; see `condition`.
        """
        batch_shape = x_t.shape[: x_t.ndim - len(self.event_shape)]
        sigma = jnp.asarray(sigma, self.dtype)
        level = _align(sigma, self.event_shape)
        scale = self.base.scale
        c_in = jax.lax.rsqrt(scale**2 + level**2)
        net_in = (c_in * (x_t - self.base.mean)).reshape(-1, *self.event_shape)
        noise = jnp.log(sigma / scale) / 4
        if noise.ndim:
            noise = jnp.broadcast_to(noise, batch_shape)
        contexts = self._check_context(context)
        net_out = self.net(net_in, noise.reshape(-1), *contexts, rngs=rngs).reshape(x_t.shape)
        return self.base(x_t, sigma) + c_in * scale * level * net_out

    def _check_context(self, context: jax.Array | None) -> tuple[jax.Array, ...]:
        """Return what the network is called with beside events and noise levels."""
        if self.context_shape is None:
            return ()
        if context is None:
            raise ValueError(
                "NetworkDenoiser: the network waits for a context of shape "
                f"{self.context_shape}; say which, as in `prior.condition(context)`."
            )
        return (context,)

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Interpolate the measured ratios; see `Denoiser.error_ratio`."""
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        grid = jnp.linspace(low, high, len(self.error_ratios))
        log_sigma = jnp.log(jnp.asarray(sigma, self.dtype))
        return jnp.interp(log_sigma, grid, self.error_ratios)

    def fit_gaussian(self, mean: jax.Array, cov: Covariance) -> "NetworkDenoiser":
        """Return this denoiser with its preconditioning and its summary at a new Gaussian."""
        return NetworkDenoiser(self.net, mean, cov)

    def summarise(self, mean: jax.Array, cov: Covariance) -> "NetworkDenoiser":
        """Return this denoiser with a new Gaussian summary, and its preconditioning as it was."""
        return NetworkDenoiser(self.net, mean, cov, self.base)


def _flatten(x: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
    return x.reshape(*x.shape[: x.ndim - len(event_shape)], -1)


def _align(sigma: jax.Array, event_shape: tuple[int, ...]) -> jax.Array:
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


def _gaussian(denoiser: Denoiser, mean: ArrayLike, cov: Covariance | ArrayLike) -> dict[str, Any]:
    """Return mean and covariance of one floating type, that of the mean."""
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


def _set(denoiser: Denoiser, **attributes: Any) -> None:
    for name, value in attributes.items():
        object.__setattr__(denoiser, name, value)
