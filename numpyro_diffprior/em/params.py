r"""``numpyro.param`` sites, learned beside a prior.

The M-step of expectation maximization increases the observed sites' expected log-density,
:math:`E \log p(y \mid x, \phi)` over draws of :math:`x`, with respect to a model's parameters
:math:`\phi` (a noise level, a gain), by steps of an optimizer in unconstrained coordinates.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from numpyro.distributions.transforms import Transform

from numpyro_diffprior.reading.model import BoundModel, ModelReading

__all__ = ["fit_params", "init_params"]

Params = dict[str, Any]  # arrays, or pytrees of them


def init_params(
    model: BoundModel, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    """Return the initial values of a model's parameters, and the optimizer's state."""
    if not model.reading.constraints:
        return {}, optimizer.init({})
    params = _first_values(model)
    return params, optimizer.init(_unconstrain(params, _transforms(model.reading)))


_first_values = jax.jit(lambda model: model.reading.params(model.data))


@partial(jax.jit, static_argnames=("optimizer", "num_steps"))
def fit_params(
    rng_key: jax.Array,
    model: BoundModel,
    draws: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    *,
    num_steps: int,
) -> tuple[Params, optax.OptState]:
    """Take steps of the optimizer; return the new values and the optimizer's new state.

    Args:
        rng_key: A random key.
        model: A model, read with its parameters' values; its blocks are the minibatches.
        draws: Draws by site, with shape ``(num_draws, *batch, *event)``.
        optimizer: The optimizer.
        opt_state: Its state.
        num_steps: The number of steps.
    """
    reading, data = model.reading, model.data
    transforms = _transforms(reading)
    num_events = max(group.latents.num_events for group in reading.groups)

    def loss(free: Params, indices: dict[str, jax.Array]) -> jax.Array:
        values = _constrain(free, transforms)
        given = data._replace(params=data.params | values)
        taken = dict(draws)
        for group in reading.groups:
            plate = group.latents.largest_plate
            if plate is not None and plate.name in indices:
                axis = 1 + len(group.latents.batch_shape) + plate.dim
                for name in group.latents.names:
                    taken[name] = jnp.take(draws[name], indices[plate.name], axis=axis)
        log_density = jax.vmap(lambda x: reading.log_density(given, x, indices))(taken)
        # Per event, so that the size of steps does not depend on that of a plate.
        return -log_density.mean() / num_events

    def step(
        carry: tuple[Params, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], None]:
        free, opt_state = carry
        indices = {}
        for group in reading.groups:
            plate = group.latents.largest_plate
            if plate is not None and plate.name in reading.blocks:
                size = reading.blocks[plate.name]
                indices[plate.name] = jax.random.choice(key, plate.size, (size,), replace=False)
        update, opt_state = optimizer.update(jax.grad(loss)(free, indices), opt_state, free)
        return (optax.apply_updates(free, update), opt_state), None

    start = _unconstrain(data.params, transforms), opt_state
    (free, opt_state), _ = jax.lax.scan(step, start, jax.random.split(rng_key, num_steps))
    return _constrain(free, transforms), opt_state


def _transforms(reading: ModelReading) -> dict[str, Transform]:
    """Return the transformations from unconstrained coordinates, by name."""
    return {name: dist.biject_to(constraint) for name, constraint in reading.constraints.items()}


def _unconstrain(params: Params, transforms: dict[str, Transform]) -> Params:
    return {name: jax.tree.map(transforms[name].inv, value) for name, value in params.items()}


def _constrain(free: Params, transforms: dict[str, Transform]) -> Params:
    return {name: jax.tree.map(transforms[name], value) for name, value in free.items()}
