r"""``numpyro.param`` sites, learned beside a prior.

The M-step of expectation maximisation raises the observed sites' expected log-density over a
model's parameters (a noise level, a gain), :math:`E \log p(y \mid x, \phi)` over draws of
:math:`x`, by steps of an optimiser where the parameters are not constrained.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.distributions.transforms import Transform

from numpyro_diffprior._compile.arguments import StaticArguments, merge_arguments, split_arguments
from numpyro_diffprior.reading.latent import read_latent
from numpyro_diffprior.reading.likelihood import observed_log_density
from numpyro_diffprior.reading.tracing import Model, bind, bind_whole_plates, trace_at_mean

__all__ = ["fit_params", "init_params", "with_params"]

Params = dict[str, jax.Array]


def with_params(model: Model) -> Model:
    """Return the model with its ``numpyro.param`` sites' values beside its first argument."""

    def parametrised(first: tuple[Any, Params], *args: Any, **kwargs: Any) -> Any:
        prior, params = first
        with handlers.substitute(data=params):
            return model(prior, *args, **kwargs)

    return parametrised


def init_params(
    bound: Callable[[], Any], optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    """Return the values that a bound model's parameters start from, and the optimiser's state."""
    params = {
        name: jnp.asarray(site["value"], jnp.result_type(float, site["value"]))
        for name, site in trace_at_mean(bound).items()
        if site["type"] == "param"
    }
    return params, optimizer.init(_free(params, _transforms(bound)))


def fit_params(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    draws: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    *,
    num_steps: int,
    batch_size: int,
) -> tuple[Params, optax.OptState]:
    """Make steps of the optimiser on minibatches of events.

    Args:
        rng_key: A random key.
        model: A model made by `with_params`.
        args: Its arguments, the prior and the parameters' values first.
        kwargs: Its keyword arguments.
        draws: Draws by site, with shape ``(num_draws, *batch, *event)``.
        optimizer: The optimiser.
        opt_state: Its state.
        num_steps: The number of steps.
        batch_size: The number of events of a minibatch.

    Returns:
        The new values and the optimiser's new state.
    """
    dynamic, static = split_arguments((args, kwargs))
    return _fit(
        rng_key, draws, opt_state, dynamic, static, model, optimizer, num_steps, batch_size
    )


@partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _fit(
    rng_key: jax.Array,
    draws: dict[str, jax.Array],
    opt_state: optax.OptState,
    dynamic: list[jax.Array],
    static: StaticArguments,
    model: Model,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int,
) -> tuple[Params, optax.OptState]:
    ((prior, params), *args), kwargs = merge_arguments(dynamic, static)
    bound = bind(model, ((prior, params), *args), kwargs)
    latent = read_latent(bound)
    transforms = _transforms(bound)
    # Minibatches are of the first plate; all others, and those that are joined, are whole.
    (plate, size), axis = (None, 1), 0
    if latent.plates:
        plate, size = latent.plates[0], latent.plate_sizes[0]
        axis = 1 + latent.plate_dims[0] + len(latent.batch_shape)

    def loss(free: Params, index: jax.Array) -> jax.Array:
        values = {name: transforms[name](value) for name, value in free.items()}
        indices, taken = {}, draws
        if plate is not None:
            indices = {plate: index}
            taken = {name: jnp.take(x, index, axis=axis) for name, x in draws.items()}
        bound = bind_whole_plates(model, ((prior, values), *args), kwargs, indices=indices)
        # By event, so that the size of a plate does not set the size of steps.
        return -jax.vmap(partial(observed_log_density, bound))(taken).mean() / size

    def step(
        carry: tuple[Params, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], None]:
        free, opt_state = carry
        # In order where they are all: NumPyro does not slice what belongs to a whole plate.
        index = jnp.arange(size)
        if batch_size < size:
            index = jax.random.choice(key, size, (batch_size,), replace=False)
        update, opt_state = optimizer.update(jax.grad(loss)(free, index), opt_state, free)
        return (optax.apply_updates(free, update), opt_state), None

    start = _free(params, transforms), opt_state
    (free, opt_state), _ = jax.lax.scan(step, start, jax.random.split(rng_key, num_steps))
    return {name: transforms[name](value) for name, value in free.items()}, opt_state


def _transforms(bound: Callable[[], Any]) -> dict[str, Transform]:
    """Return the transformations from where parameters are not constrained, by name."""
    return {
        name: dist.biject_to(site["kwargs"].get("constraint", dist.constraints.real))
        for name, site in trace_at_mean(bound).items()
        if site["type"] == "param"
    }


def _free(params: Params, transforms: dict[str, Transform]) -> Params:
    return {name: transforms[name].inv(value) for name, value in params.items()}
