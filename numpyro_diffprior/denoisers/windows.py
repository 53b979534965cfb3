r"""A denoiser of long sequences and large fields, composed from a denoiser of their windows.

In a Markov process, an element depends on the others through its neighbors. Its posterior mean is
therefore close to that given a window of the noisy elements around it (a pseudo-blanket),

.. math:: E[x_i \mid x_t] \approx E[x_i \mid x_{t, i - k : i + k}],

so that a denoiser of windows with :math:`w = 2 k + 1` elements defines a prior of any length.

References:
    Rozet and Louppe, *Score-based data assimilation*, NeurIPS 2023, arXiv 2306.10574, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser, as_covariance, check_size, register
from numpyro_diffprior.denoisers.windowed_axes import WindowedAxis, outer
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.linalg.covariances import Blocks, Covariance, Repeated
from numpyro_diffprior.linalg.stationary import extend_stationary

__all__ = ["WindowDenoiser"]

_STATIC = {"static": True}


@register
@dataclass(frozen=True, eq=False, init=False)
class WindowDenoiser(Denoiser):
    r"""The denoiser of a long sequence or a large field, from the denoiser of its windows.

    The posterior mean of an element is read from one window around it. Windows of length :math:`w`
    start every ``stride`` elements, and each gives its central ``stride`` elements; at the ends of
    an axis that is not periodic, the first and the last window give their margins too. With
    ``stride=1`` every element is the center of its window, except near the ends, as in the paper.
    A larger stride :math:`s` takes fewer evaluations (`num_windows`) and leaves a margin of
    :math:`m = \lfloor (w - s) / 2 \rfloor` elements. The windows of several axes multiply: there,
    use a stride of half a window, say.

    This is an approximation, even for Markov chains: at noise levels above zero, the posterior
    mean of an element depends on all others, and a window drops those beyond it. The error decays
    with the margin. For a Gaussian chain of first order with correlation :math:`\rho` between
    neighbors, its root mean square is at most :math:`\sqrt{2} \rho^{m + 1}` standard deviations,
    at any noise level. In general the composition is not the posterior mean of any prior: its
    Jacobian is not symmetric where elements are not in the center of their window. All windows
    must have the same distribution, and structure longer than a window is not described. With the
    ``length`` of the window itself, the result is the given denoiser.

    The Gaussian summary follows from that of the windows. Along one axis, consecutive windows are
    taken as independent. Over several axes, the field is taken as stationary and periodic, with
    the autocovariance of the windows, tapered. Pass ``cov`` if a better covariance is known: it
    sets the noise levels, and the covariance of Gaussian guidance, which several particles use by
    default. The error ratios are those of the windows.

    Args:
        wrapped: The denoiser of windows, with event shape ``(*window, *features)``.
        length: The length of the events along each axis of the windows, or an integer for one
            axis. Events have shape ``(*length, *features)``.
        stride: The number of elements from one window to the next, for all axes or for each.
        periodic: Whether the last elements of an axis are neighbors of the first ones, for all
            axes or for each.
        cov: The covariance over flattened events, or a matrix, in the unit of ``wrapped``
            (default: from the windows).
        max_batch_size: The number of windows of an event that are evaluated at once (default: as
            many as have together the size of an event). It bounds the memory. If it is less than
            `num_windows`, gradients evaluate the windows again.

    Raises:
        ValueError: If ``wrapped`` is not a denoiser or has its contexts already, a length, stride
            or flag does not fit the windows, or the covariance has another size.

    Example:
        >>> window = GaussianDenoiser(jnp.zeros((5, 2)), jnp.eye(10))
        >>> denoiser = WindowDenoiser(window, 100)
        >>> denoiser(jnp.ones((3, 100, 2)), 1.0).shape
        (3, 100, 2)
    """

    wrapped: Denoiser
    mean: jax.Array
    cov: Covariance
    length: tuple[int, ...] = field(metadata=_STATIC)
    stride: tuple[int, ...] = field(metadata=_STATIC)
    periodic: tuple[bool, ...] = field(metadata=_STATIC)
    max_batch_size: int | None = field(metadata=_STATIC)

    def __init__(
        self,
        wrapped: Denoiser,
        length: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        periodic: bool | Sequence[bool] = False,
        cov: Covariance | ArrayLike | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if not isinstance(wrapped, Denoiser):
            raise ValueError(
                f"WindowDenoiser: expected a Denoiser of windows, got {type(wrapped).__name__}; "
                "wrap a network as NetworkDenoiser(net)."
            )
        if isinstance(wrapped, ConditionedDenoiser):
            raise ValueError(
                "WindowDenoiser: expected a denoiser without given contexts, got a "
                "ConditionedDenoiser; condition the prior of the long events: "
                "DiffusionPrior(WindowDenoiser(denoiser, length)).condition(context)."
            )
        lengths = tuple(length) if isinstance(length, Sequence) else (length,)
        window = wrapped.event_shape[: len(lengths)]
        if not 0 < len(lengths) <= len(wrapped.event_shape):
            raise ValueError(
                f"WindowDenoiser: expected one length for each windowed axis, got {length!r} for "
                f"windows of shape {wrapped.event_shape}; the other axes keep their lengths."
            )
        strides = _per_axis("stride", stride, len(window))
        flags = _per_axis("periodic", periodic, len(window))
        if max_batch_size is not None:
            max_batch_size = check_count("WindowDenoiser", "max_batch_size", max_batch_size)
        set_fields(
            self,
            wrapped=wrapped,
            length=tuple(_check_length(n, w) for n, w in zip(lengths, window, strict=True)),
            stride=tuple(_check_stride(s, w) for s, w in zip(strides, window, strict=True)),
            periodic=tuple(bool(flag) for flag in flags),
            max_batch_size=max_batch_size,
        )
        # The mean of an element is that of the place in the window where it is read.
        mean = wrapped.mean[np.ix_(*(axis.offsets() for axis in self._axes()))]
        summary = self._summarize() if cov is None else cov
        summary = as_covariance("WindowDenoiser", summary, mean.dtype)
        check_size("WindowDenoiser", mean.shape, summary)
        set_fields(self, mean=mean, cov=summary)

    def __call__(
        self,
        x_t: jax.Array,
        sigma: jax.Array | float,
        context: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Return the approximate conditional mean.

        Contexts have shape ``(n, *context_shape)``, one for each of the ``n`` events in the batch;
        all windows of an event get its context.

        Raises:
            ValueError: If ``rngs`` are given, since only the denoiser of windows can be trained.
        """
        if rngs is not None:
            raise ValueError(
                "WindowDenoiser: expected no rngs, which are for training; train the denoiser of "
                "windows on windows of the events."
            )
        return _denoise(self, jnp.asarray(x_t), jnp.asarray(sigma, self.dtype), context)

    @property
    def num_windows(self) -> int:
        """The number of windows of an event: the evaluations of the denoiser of windows."""
        return prod(len(axis.starts) for axis in self._axes())

    @property
    def unit(self) -> jax.Array | float:  # type: ignore[override]
        return self.wrapped.unit

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        return self.wrapped.context_shape

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        return self.wrapped.error_ratio(sigma)

    def in_unit(self, unit: jax.Array) -> "WindowDenoiser":
        ratio = self.unit / unit
        return WindowDenoiser(
            self.wrapped.in_unit(unit),
            self.length,
            stride=self.stride,
            periodic=self.periodic,
            cov=self.cov.scale(ratio**2),
            max_batch_size=self.max_batch_size,
        )

    def _axes(self) -> list["WindowedAxis"]:
        options = zip(self.length, self._window, self.stride, self.periodic, strict=True)
        return [WindowedAxis.cut(*option) for option in options]

    @property
    def _window(self) -> tuple[int, ...]:
        """The shape of a window along the axes of `length`."""
        return self.wrapped.event_shape[: len(self.length)]

    def _summarize(self) -> Covariance:
        """Return the covariance of events of independent or of stationary windows."""
        cov, window = self.wrapped.cov, self._window
        if len(window) > 1:
            return extend_stationary(cov, window, self.length)
        num, rest = divmod(self.length[0], window[0])
        whole = Repeated(cov, num) if num > 1 else cov
        if not rest:
            return whole
        return Blocks((whole, cov.leading(rest * cov.size // window[0])))

    def _evaluate(
        self, windows: jax.Array, sigma: jax.Array, context: jax.Array | None
    ) -> jax.Array:
        """Return the means of windows, with shape ``(*batch, n, *window, *features)``."""
        wrapped: Any = self.wrapped
        sigma = sigma[..., None] if sigma.ndim else sigma
        if context is None:
            return wrapped(windows, sigma)
        num = windows.shape[windows.ndim - len(wrapped.event_shape) - 1]
        return wrapped(windows, sigma, jnp.repeat(context, num, axis=0))

    def _batch_size(self) -> int:
        """Return how many windows are evaluated at once."""
        limit = self.max_batch_size
        if limit is None:
            limit = max(1, prod(self.length) // prod(self._window))
        num_parts = -(-self.num_windows // limit)
        return -(-self.num_windows // num_parts)  # parts as even as possible


# Compiled here: eager calls would compile the loop anew every time.
@jax.jit
def _denoise(
    denoiser: WindowDenoiser, x: jax.Array, sigma: jax.Array, context: jax.Array | None
) -> jax.Array:
    axes, num, size = denoiser._axes(), denoiser.num_windows, denoiser._batch_size()
    counts = tuple(len(axis.starts) for axis in axes)
    features = (slice(None),) * (len(denoiser.event_shape) - len(axes))
    x = x.astype(jnp.result_type(x, denoiser.dtype))

    def add(total: jax.Array, numbers: jax.Array) -> tuple[jax.Array, None]:
        """Add the elements that are read from the windows with these numbers."""
        index = jnp.unravel_index(jnp.minimum(numbers, num - 1), counts)
        places = [axis.places(i) for axis, i in zip(axes, index, strict=True)]
        targets = [axis.targets(i) for axis, i in zip(axes, index, strict=True)]
        # A target beyond the end is dropped.
        targets[0] = jnp.where((numbers < num)[:, None], targets[0], axes[0].length)
        means = denoiser._evaluate(x[(..., *outer(places), *features)], sigma, context)
        means = means.astype(x.dtype)
        return total.at[(..., *outer(targets), *features)].add(means, mode="drop"), None

    total = jnp.zeros_like(x)
    if size == num:
        return add(total, jnp.arange(num))[0]
    # Checkpointed: gradients keep the intermediate values of one part, not of all.
    numbers = jnp.arange(-(-num // size) * size).reshape(-1, size)
    return jax.lax.scan(jax.checkpoint(add), total, numbers)[0]


def _per_axis(name: str, value: Any, num_axes: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num_axes
    if len(values) != num_axes:
        raise ValueError(
            f"WindowDenoiser: expected {name} to be one value for all axes, or one for each of "
            f"the {num_axes} axes in `length`, got {value!r}."
        )
    return values


def _check_length(length: Any, window: int) -> int:
    length = check_count("WindowDenoiser", "length", length)
    if length < window:
        raise ValueError(
            f"WindowDenoiser: expected a length of at least the window's, {window}, got {length}; "
            "train a denoiser of shorter windows."
        )
    return length


def _check_stride(stride: Any, window: int) -> int:
    stride = check_count("WindowDenoiser", "stride", stride)
    if stride > window:
        raise ValueError(
            f"WindowDenoiser: expected a stride of at most the window's length, {window}, got "
            f"{stride}, which leaves elements in no window; pass a smaller one."
        )
    return stride
