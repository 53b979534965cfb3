r"""A denoiser given by a function, such as a pretrained model or one of another library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffprior._compile.arguments import StaticArguments, merge_arguments, split_arguments
from numpyro_diffprior._compile.checks import set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser, as_gaussian, register
from numpyro_diffprior.linalg.covariances import Covariance

__all__ = ["FunctionDenoiser"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    """The static part of a function."""

    arguments: StaticArguments


@register
@dataclass(frozen=True, eq=False, init=False)
class FunctionDenoiser(Denoiser):
    r"""A denoiser given by a function, with mean and covariance of its prior.

    The function is either a plain function, which is static and compared by identity, or a
    callable pytree (a module with weights), whose arrays may change without recompilation.

    Args:
        function: The conditional mean :math:`D(x_t, \sigma)`, a function of noisy events with
            shape ``(*batch, *event)`` and noise levels with shape ``(*batch,)``, both in ``unit``.
            It returns an array of the events' shape. Guidance differentiates it in ``x_t``.
        mean: The prior's mean or an estimate, with shape ``event_shape``.
        cov: The prior's covariance over flattened events, or an estimate: a `Covariance` or a
            matrix. It sets the range of noise levels, and the covariance of Gaussian guidance.
        unit: The unit of function, mean and covariance in units of the data.

    Raises:
        ValueError: If the function cannot be called with one event, or returns another shape.

    Example:
        >>> denoiser = FunctionDenoiser(
        ...     lambda x_t, sigma: x_t / (1 + sigma[..., None] ** 2), jnp.zeros(3), jnp.eye(3)
        ... )
        >>> denoiser(jnp.ones(3), 1.0)
        Array([0.5, 0.5, 0.5], dtype=float32)
    """

    arrays: list[jax.Array]
    static: _Static
    mean: jax.Array
    cov: Covariance
    unit: jax.Array

    def __init__(
        self,
        function: Callable[[jax.Array, jax.Array], jax.Array],
        mean: ArrayLike,
        cov: Covariance | ArrayLike,
        unit: ArrayLike = 1.0,
    ) -> None:
        if not callable(function):
            raise ValueError(
                f"FunctionDenoiser: expected a function of x_t and sigma, got {function!r}."
            )
        arrays, static = split_arguments(function)
        summary = as_gaussian(self, mean, cov, unit)
        set_fields(self, arrays=arrays, static=_Static(static), **summary)
        self._check()

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        batch_shape = x_t.shape[: x_t.ndim - len(self.event_shape)]
        levels = jnp.broadcast_to(jnp.asarray(sigma, self.dtype), batch_shape)
        function: Any = merge_arguments(self.arrays, self.static.arguments)
        return jnp.asarray(function(x_t, levels), self.dtype)

    def _check(self) -> None:
        x_t = jax.ShapeDtypeStruct((2, *self.event_shape), self.dtype)
        sigma = jax.ShapeDtypeStruct((2,), self.dtype)
        try:
            found = jax.eval_shape(self, x_t, sigma)
        except Exception as error:
            raise ValueError(
                "FunctionDenoiser: expected a function of x_t, with shape (*batch, "
                f"*{self.event_shape}), and sigma, (*batch,); called with two events it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        if found.shape != x_t.shape:
            raise ValueError(
                f"FunctionDenoiser: expected a function that returns events like x_t, of shape "
                f"{x_t.shape}, got {found.shape}."
            )
