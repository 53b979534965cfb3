r"""`DiffusionPrior`: a prior given by a denoiser, as a NumPyro distribution.

The distribution of :math:`x` is defined by :math:`D(x_t, \sigma) = E[x \mid x_t]`, with
:math:`x_t = x + \sigma \varepsilon`. Draws come from a sampler
(`numpyro_diffprior.diffusion.samplers`), and the log-density is that of the probability flow, a
normalized density that HMC can use.

References:
    Song et al., *Score-based generative modeling through stochastic differential equations*, ICLR
    2021, arXiv 2011.13456 (section 4.3 and appendix D.2).
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample
from numpyro.util import not_jax_tracer

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.memory import BatchLimit, advise, check_memory
from numpyro_diffprior.denoisers.denoiser import Denoiser, choose_unit
from numpyro_diffprior.denoisers.serialization import load_denoiser, save_denoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.diffusion.probability_flow import flow_log_prob
from numpyro_diffprior.diffusion.samplers import MultistepSDE, Sampler

__all__ = ["DiffusionPrior", "check_sampler"]

_MAX_EXACT = 64  # elements of an event up to which the exact divergence is cheap
_NUM_PROBES = 16


class DiffusionPrior(Distribution):
    r"""The distribution over events that a denoiser defines.

    The batch shape of a prior is empty: plates and ``expand`` repeat it. A conditioned prior
    (`condition`) has the batch shape of its contexts. A prior is a pytree whose leaves are the
    denoiser's arrays, so that functions compiled for one prior also run with new weights; the
    sampler and the other options are static.

    `sample` and `log_prob` process ``max_batch_size`` events at a time, which bounds their memory.
    Draws depend on the key and on ``max_batch_size``.

    Events and noise levels, also the limits of a sampler, are in the data's units, whatever the
    denoiser's (`Denoiser.unit`). The elements of an event should have similar scales
    (standardize the columns of a catalog): sampling stops at the denoiser's ``sigma_min``, a
    thousandth of the elements' root-mean-square deviation, and draws of elements with a deviation
    below ten times ``sigma_min`` are too narrow. More steps reduce the sampler's bias.
    `log_prob` is the density of the probability flow, smoothed by noise of the denoiser's
    ``sigma_min``; it is differentiable at the cost of some ten evaluations of the denoiser's
    Jacobian. If the integration of an event fails it is NaN, a divergence for NUTS.

    Args:
        denoiser: The denoiser, of events of any shape.
        sampler: The sampler of prior draws, and the default for posterior draws.
        num_probes: The number of Hutchinson probes for the divergence in `log_prob`, the same for
            all calls. By default the divergence is exact up to 64 elements, and estimated with 16
            probes beyond. With at least as many probes as elements it is exact.
        max_batch_size: The number of events that are processed at once (default: 1,024, or fewer
            with 2^18 elements in all, counting those of every probe in `log_prob`).
        validate_args: Whether `log_prob` validates the values that it gets.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range, if the denoiser's mean
            and covariance differ in size or are not finite, or if its dtype is neither float32
            nor float64.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffprior import GaussianDenoiser
        >>> prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(3), jnp.eye(3)))
        >>> prior.sample(jax.random.key(0), (5,)).shape
        (5, 3)
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("denoiser",)
    pytree_aux_fields = ("sampler", "num_probes", "max_batch_size")

    denoiser: Denoiser
    sampler: Sampler
    num_probes: int | None
    max_batch_size: int | None

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        sampler: Sampler = MultistepSDE(),
        num_probes: int | None = None,
        max_batch_size: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # JAX rebuilds pytrees without __init__, so that these checks never see placeholders.
        _check_denoiser(denoiser)
        denoiser = _near_one(denoiser)
        check_sampler(sampler)
        if num_probes is not None:
            num_probes = check_count("DiffusionPrior", "num_probes", num_probes)
        self.denoiser = denoiser
        self.sampler = sampler
        self.num_probes = num_probes
        if max_batch_size is not None:
            max_batch_size = check_count("DiffusionPrior", "max_batch_size", max_batch_size)
        self.max_batch_size = max_batch_size
        batch_shape = denoiser.batch_shape if isinstance(denoiser, ConditionedDenoiser) else ()
        super().__init__(batch_shape, denoiser.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All real events."""
        if self.event_dim == 0:
            return constraints.real
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> jax.Array:
        """The mean of the denoiser's Gaussian summary.

        Exact for analytic denoisers, and as good as the fit for learned ones.
        """
        return self._repeat(self.denoiser.to_data(self.denoiser.mean))

    @property
    def variance(self) -> jax.Array:
        """The variances of the denoiser's Gaussian summary."""
        variance = self.denoiser.cov.diagonal().reshape(jnp.shape(self.denoiser.mean))
        return self._repeat(self.denoiser.to_data(self.denoiser.to_data(variance)))

    def condition(self, context: ArrayLike) -> "DiffusionPrior":
        """Return the prior given contexts, for networks with a ``context_shape``.

        In a plate, pass contexts through `numpyro.subsample`. A context may be another latent site
        of the model. That site then needs a kernel of its own that evaluates `log_prob`, such as
        NUTS (without `mask_priors`): sites with diffusion priors are drawn together only if the
        priors do not depend on each other.

        Args:
            context: Contexts, with shape ``(*batch, *context_shape)``; ``batch`` is the batch
                shape of the prior returned.

        Raises:
            ValueError: If the network takes no contexts, or contexts of another shape.

        Example:
            >>> import jax.numpy as jnp, numpyro
            >>> from flax import nnx
            >>> from numpyro_diffprior import MLP, NetworkDenoiser
            >>> net = MLP((2,), context_shape=(3,), rngs=nnx.Rngs(0))
            >>> prior = DiffusionPrior(NetworkDenoiser(net))
            >>> def model(prior, label):
            ...     with numpyro.plate("events", len(label)):
            ...         label = numpyro.subsample(label, event_dim=1)
            ...         return numpyro.sample("x", prior.condition(label))
            >>> prior.condition(jnp.eye(3)).batch_shape
            (3,)
        """
        return self.replace_denoiser(ConditionedDenoiser(self.denoiser, context))

    def replace_denoiser(self, denoiser: Denoiser) -> "DiffusionPrior":
        """Return a prior with another denoiser and the same options."""
        return DiffusionPrior(
            denoiser,
            sampler=self.sampler,
            num_probes=self.num_probes,
            max_batch_size=self.max_batch_size,
            validate_args=self._validate_args,
        )

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw independent events, with shape ``(*sample_shape, *batch, *event)``."""
        shape = (*sample_shape, *self.batch_shape)
        size = self._batch_size(prod(self.event_shape))
        return _sample(key, self.denoiser, self.sampler, shape, min(size, max(1, prod(shape))))

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the log-density of events by the probability flow.

        Args:
            value: Events, with shape ``(*batch, *event)``.
            intermediates: Not used.

        Returns:
            Log-densities, with shape ``(*batch,)``.

        Raises:
            ValueError: If the last axes of ``value`` do not have the event shape.
        """
        x, size = self._events(value), prod(self.event_shape)
        batch_shape = jnp.broadcast_shapes(x.shape[: x.ndim - self.event_dim], self.batch_shape)
        x = jnp.broadcast_to(x, (*batch_shape, *self.event_shape))
        default = size if size <= _MAX_EXACT else _NUM_PROBES
        num_probes = default if self.num_probes is None else self.num_probes
        exact = num_probes >= size
        batch_size = self._batch_size(size * min(num_probes, size))
        batch_size = min(batch_size, max(1, prod(batch_shape)))
        log_prob = _log_prob(self.denoiser, x, None if exact else num_probes, batch_size)
        return log_prob - size * jnp.log(self.denoiser.unit)

    def denoise(self, x_t: ArrayLike, sigma: ArrayLike) -> jax.Array:
        r"""Return :math:`E[x \mid x_t]`.

        Args:
            x_t: Noisy events, with shape ``(*batch, *event)``.
            sigma: Noise levels, broadcastable to shape ``(*batch,)``.

        Raises:
            ValueError: If the last axes of ``x_t`` do not have the event shape.
        """
        return self.denoiser.to_data(self.denoiser(self._events(x_t), self._level(sigma)))

    def score(self, x_t: ArrayLike, sigma: ArrayLike) -> jax.Array:
        r"""Return :math:`\nabla_{x_t} \log p(x_t)`, the score of the noisy prior.

        Args:
            x_t: Noisy events, with shape ``(*batch, *event)``.
            sigma: Noise levels, broadcastable to shape ``(*batch,)``.

        Raises:
            ValueError: If the last axes of ``x_t`` do not have the event shape.
        """
        return self.denoiser.from_data(self.denoiser.score(self._events(x_t), self._level(sigma)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the denoiser to a safetensors file; see `save_denoiser`.

        The sampler and the other options are not stored; pass them to `load` again.
        """
        save_denoiser(path, self.denoiser)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        networks: Mapping[str, Callable[..., nnx.Module]] | None = None,
        sampler: Sampler = MultistepSDE(),
        num_probes: int | None = None,
        max_batch_size: int | None = None,
        validate_args: bool | None = None,
    ) -> Self:
        """Read a prior from a file written by `save` or `save_denoiser`; see `load_denoiser`.

        Args:
            path: The file.
            networks: Your own network classes, by name.
            sampler: See `DiffusionPrior`.
            num_probes: See `DiffusionPrior`.
            max_batch_size: See `DiffusionPrior`.
            validate_args: See `DiffusionPrior`.
        """
        return cls(
            load_denoiser(path, networks=networks),
            sampler=sampler,
            num_probes=num_probes,
            max_batch_size=max_batch_size,
            validate_args=validate_args,
        )

    def _batch_size(self, num_elements: int) -> int:
        """Return how many events, of a number of elements each, are processed at once."""
        limit = BatchLimit.of("DiffusionPrior", self.max_batch_size, default=1024)
        return limit.num_groups(num_elements)

    def _repeat(self, x: jax.Array) -> jax.Array:
        """Broadcast an event to the batch shape."""
        return jnp.broadcast_to(x, (*self.batch_shape, *jnp.shape(x)))

    def _events(self, x: ArrayLike) -> jax.Array:
        """Check events and return them in the denoiser's unit."""
        shape = jnp.shape(x)
        if shape[max(len(shape) - self.event_dim, 0) :] != self.event_shape:
            raise ValueError(
                f"DiffusionPrior: expected events of shape {self.event_shape} in the last axes, "
                f"got an array of shape {shape}; reshape it to (*batch, *event_shape)."
            )
        return self.denoiser.from_data(jnp.asarray(x, self.denoiser.dtype))

    def _level(self, sigma: ArrayLike) -> jax.Array:
        return self.denoiser.from_data(jnp.asarray(sigma, self.denoiser.dtype))


def _advise(factor: float, *args: Any) -> str:
    max_batch_size: int = args[-1]
    return "DiffusionPrior: " + advise("max_batch_size", factor, max_batch_size)


# Compiled here: eager calls would compile the loops anew every time.
@check_memory("Samples", _advise)
@partial(jax.jit, static_argnums=(2, 3, 4))
def _sample(
    rng_key: jax.Array,
    denoiser: Denoiser,
    sampler: Sampler,
    batch_shape: tuple[int, ...],
    max_batch_size: int,
) -> jax.Array:
    num = prod(batch_shape)
    if num == 0:
        return jnp.zeros((*batch_shape, *denoiser.event_shape), denoiser.dtype)
    num_chunks, size = _chunks(num, max_batch_size)
    if num_chunks == 1:
        return denoiser.to_data(sampler.sample(rng_key, denoiser, batch_shape))

    def chunk(inputs: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        key, contexts = inputs
        return denoiser.to_data(sampler.sample(key, denoiser.at_contexts(contexts), (size,)))

    contexts = _cut(denoiser.contexts(batch_shape), num_chunks, size)
    draws = jax.lax.map(chunk, (jax.random.split(rng_key, num_chunks), contexts))
    draws = draws.reshape(num_chunks * size, *denoiser.event_shape)[:num]
    return draws.reshape(*batch_shape, *denoiser.event_shape)


@check_memory("Log-densities", _advise)
@partial(jax.jit, static_argnums=(2, 3))
def _log_prob(
    denoiser: Denoiser, x: jax.Array, num_probes: int | None, max_batch_size: int
) -> jax.Array:
    event_shape = denoiser.event_shape
    batch_shape = x.shape[: x.ndim - len(event_shape)]
    num = prod(batch_shape)
    if num == 0:
        return jnp.zeros(batch_shape, x.dtype)
    num_chunks, size = _chunks(num, max_batch_size)
    if num_chunks == 1:
        return flow_log_prob(denoiser, x, num_probes=num_probes)

    # Checkpointed: the gradient keeps the intermediate values of one chunk, not of all.
    @jax.checkpoint
    def chunk(inputs: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        x, contexts = inputs
        return flow_log_prob(denoiser.at_contexts(contexts), x, num_probes=num_probes)

    x = x.reshape(num, *event_shape)
    contexts = _cut(denoiser.contexts(batch_shape), num_chunks, size)
    log_probs = jax.lax.map(chunk, (_cut(x, num_chunks, size), contexts))
    return log_probs.reshape(-1)[:num].reshape(batch_shape)


def _chunks(num: int, max_batch_size: int) -> tuple[int, int]:
    """Return the number and the size of the fewest chunks, as even as possible."""
    num_chunks = -(-num // max_batch_size)
    return num_chunks, -(-num // num_chunks)


def _cut(x: jax.Array | None, num_chunks: int, size: int) -> jax.Array | None:
    """Cut into chunks of one size, padded with copies of the first elements."""
    if x is None:
        return None
    x = jnp.concatenate([x, x[: num_chunks * size - len(x)]])
    return x.reshape(num_chunks, size, *x.shape[1:])


def _check_denoiser(denoiser: Denoiser) -> None:
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"DiffusionPrior: expected a Denoiser, got {type(denoiser).__name__}; wrap a network "
            "as NetworkDenoiser(net), a mean and a covariance as GaussianDenoiser(mean, cov)."
        )
    if any(leaf is denoiser for leaf in jax.tree.leaves(denoiser)):
        raise ValueError(
            f"DiffusionPrior: the denoiser {type(denoiser).__name__} is no pytree; decorate its "
            "class with `jax.tree_util.register_dataclass` (above `@dataclass`), so that JAX sees "
            "its arrays, or use FunctionDenoiser."
        )
    if denoiser.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"DiffusionPrior: expected a denoiser of type float32 or float64, got "
            f"{denoiser.dtype}; convert its mean and covariance (its network may have half "
            "precision)."
        )
    if denoiser.cov.size != denoiser.event_size:
        raise ValueError(
            f"DiffusionPrior: events of shape {denoiser.event_shape} need a covariance of size "
            f"{denoiser.event_size}, got one of size {denoiser.cov.size}; fit mean and covariance "
            "to the same flattened events."
        )
    with jax.ensure_compile_time_eval():  # also if a model builds its prior inside jit
        finite = jnp.all(jnp.isfinite(denoiser.mean))
        scale = denoiser.scale
        positive = jnp.all((scale > 0) & jnp.isfinite(scale))
    if not_jax_tracer(finite) and not finite:
        raise ValueError(
            "DiffusionPrior: expected a finite mean, got NaN or infinity; check the data that "
            "the mean was fitted to."
        )
    if not_jax_tracer(positive) and not positive:
        raise ValueError(
            "DiffusionPrior: expected a covariance with positive and finite total variance, got a "
            f"scale of {scale}; it sets the noise levels, so give the prior some width. Variances "
            f"too small for {denoiser.dtype} need a unit: GaussianDenoiser(mean, cov, unit=1e-17)."
        )


def _near_one(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser in a unit in which powers of its scale do not over- or underflow."""
    scale, limits = denoiser.scale, jnp.finfo(denoiser.dtype)
    low, high = float(limits.tiny) ** (1 / 6), float(limits.max) ** (1 / 4)
    if not not_jax_tracer(scale) or scale.ndim or low < float(scale) < high:
        return denoiser
    return denoiser.in_unit(choose_unit(denoiser.to_data(scale), denoiser.unit))


def check_sampler(sampler: Sampler) -> None:
    """Raise a `ValueError` unless it is a hashable `Sampler`."""
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"expected an instance of Sampler, got {sampler!r}; pass an object such as "
            "MultistepSDE(num_steps=64)."
        )
    try:
        hash(sampler)
    except TypeError as error:
        raise ValueError(
            f"expected a hashable sampler, since it is static under jit, got {sampler}; give it "
            "Python numbers instead of arrays."
        ) from error
