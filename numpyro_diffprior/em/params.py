r"""``numpyro.param`` sites, learned beside a prior.

The M-step of expectation maximization increases the observed sites' expected log-density,
:math:`E \log p(y \mid x, \phi)` over draws of :math:`x`, with respect to a model's parameters
:math:`\phi` (a noise level, a gain), by steps of an optimizer in unconstrained coordinates.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax.sharding import Mesh
from numpyro.distributions.transforms import Transform

from numpyro_diffprior.reading.model import BoundModel, ModelReading
from numpyro_diffprior.reading.parts import load_elements

__all__ = ["fit_params", "init_params"]

Params = dict[str, Any]  # arrays, or pytrees of them


def init_params(
    model: BoundModel, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    """Return the initial values of a model's parameters, and the optimizer's state."""
    if not model.reading.constraints:
        return {}, optimizer.init({})
    params = _first_values(load_elements(model, {}))
    return params, optimizer.init(_unconstrain(params, _transforms(model.reading)))


_first_values = jax.jit(lambda model: model.reading.params(model.data))


def fit_params(
    rng_key: jax.Array,
    model: BoundModel,
    draws: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    *,
    num_steps: int,
    mesh: Mesh | None = None,
) -> tuple[Params, optax.OptState]:
    """Take steps of the optimizer; return the new values and the optimizer's new state.

    Args:
        rng_key: A random key.
        model: A model, read with its parameters' values; its blocks are the minibatches.
        draws: Draws by site, with shape ``(num_draws, *batch, *event)``. Of arrays of NumPy, only
            the elements in the minibatches go to the device.
        optimizer: The optimizer.
        opt_state: Its state.
        num_steps: The number of steps.
        mesh: The devices that hold the data, or None.
    """
    minibatches = _choose_minibatches(rng_key, model.reading, num_steps)
    elements = {plate: np.sort(index, axis=None) for plate, index in minibatches.items()}
    model = load_elements(model, elements, mesh)
    held: dict[str, Any] = {}
    if any(isinstance(x, np.ndarray) for x in draws.values()):
        held, taken = elements, dict[str, Any](draws)
        for name, axis, plate in _divided_axes(model.reading):
            taken[name] = np.take(draws[name], held[plate], axis=axis)
        draws = taken
    return _fit(model, draws, held, minibatches, optimizer, opt_state, num_steps)


@partial(jax.jit, static_argnums=(1, 2))
def _choose_minibatches(
    rng_key: jax.Array, reading: ModelReading, num_steps: int
) -> dict[str, jax.Array]:
    """Return the elements of divided plates in each step, with shape ``(num_steps, size)``."""
    plates = {g.divided[0].name: g.divided[0] for g in reading.groups if g.divided is not None}

    def choose(key: jax.Array) -> dict[str, jax.Array]:
        return {
            name: jax.random.choice(key, plate.size, (reading.blocks[name],), replace=False)
            for name, plate in plates.items()
        }

    return jax.lax.map(choose, jax.random.split(rng_key, num_steps))


@partial(jax.jit, static_argnames=("optimizer", "num_steps"))
def _fit(
    model: BoundModel,
    draws: dict[str, jax.Array],
    held: dict[str, jax.Array],
    minibatches: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    num_steps: int,
) -> tuple[Params, optax.OptState]:
    """Take a step of the optimizer on each minibatch."""
    reading, data = model.reading, model.data
    transforms = _transforms(reading)
    num_events = max(group.latents.num_events for group in reading.groups)

    def loss(free: Params, indices: dict[str, jax.Array]) -> jax.Array:
        values = _constrain(free, transforms)
        given = data._replace(params=data.params | values)
        taken = dict(draws)
        for name, axis, plate in _divided_axes(reading):
            index = indices[plate]
            if plate in held:
                index = jnp.searchsorted(held[plate], index)
            taken[name] = jnp.take(draws[name], index, axis=axis)
        log_density = jax.vmap(lambda x: reading.log_density(given, x, indices))(taken)
        # Per event, so that the size of steps does not depend on that of a plate.
        return -log_density.mean() / num_events

    def step(
        carry: tuple[Params, optax.OptState], indices: dict[str, jax.Array]
    ) -> tuple[tuple[Params, optax.OptState], None]:
        free, opt_state = carry
        update, opt_state = optimizer.update(jax.grad(loss)(free, indices), opt_state, free)
        return (optax.apply_updates(free, update), opt_state), None

    start = _unconstrain(data.params, transforms), opt_state
    (free, opt_state), _ = jax.lax.scan(step, start, minibatches, num_steps)
    return _constrain(free, transforms), opt_state


def _divided_axes(reading: ModelReading) -> Iterator[tuple[str, int, str]]:
    """Yield the sites in divided plates, each with the axis of its draws and the plate's name."""
    for group in reading.groups:
        if group.divided is not None:
            plate, _ = group.divided
            axis = 1 + len(group.latents.batch_shape) + plate.dim
            for name in group.latents.names:
                yield name, axis, plate.name


def _transforms(reading: ModelReading) -> dict[str, Transform]:
    """Return the transformations from unconstrained coordinates, by name."""
    return {name: dist.biject_to(constraint) for name, constraint in reading.constraints.items()}


def _unconstrain(params: Params, transforms: dict[str, Transform]) -> Params:
    return {name: jax.tree.map(transforms[name].inv, value) for name, value in params.items()}


def _constrain(free: Params, transforms: dict[str, Transform]) -> Params:
    return {name: jax.tree.map(transforms[name], value) for name, value in free.items()}
