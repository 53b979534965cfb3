"""Dependence that a program shows."""

import jax
import jax.numpy as jnp
import pytest

from numpyro_diffprior._compile.dependence import depends, picks_elements

X = jnp.arange(3.0)


def scanned(x, y):
    """A carry that depends on x from the second turn on, one that does not, and their outputs."""

    def step(carry, inputs):
        first, second, third = carry
        return (second, inputs.sum() + second, third + 1), (first, third, inputs, 0.5)

    carry, outputs = jax.lax.scan(step, (0.0, 0.0, 0.0), jnp.stack([x, x]))
    return *carry, *outputs, y


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, y: (x + 1, y + 1, 2.0), (True, True, False)),
        (lambda x, y: jax.jit(lambda x, y: (x, y))(x, 1.0), (True, False)),
        (lambda x, y: jax.nn.relu(x), True),
        (lambda x, y: jnp.zeros_like(x), False),
        (scanned, (True, True, False, True, False, True, False, True)),
    ],
)
def test_depends(f, expected):
    assert depends(f, X, X) == expected


def test_on_some_arguments():
    assert depends(lambda x, y: {"x": x, "y": y}, X, X, on=[1]) == {"x": False, "y": True}


def part(x, start):
    return jax.lax.dynamic_slice(x, (start,), (3,))


def swap(x):
    return x.reshape(3, 2).T.reshape(-1)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, y: jnp.where(y > 0, jnp.exp(3 * x + y), 0), True),
        (lambda x, y: x * x + jnp.tanh(x), True),
        (lambda x, y: jnp.concatenate([x[::2], jnp.roll(x, 1), y]), True),
        (lambda x, y: swap(x) + y * swap(x), True),
        (lambda x, y: jax.jit(lambda x: x[jnp.array([0, 0, 2])])(x), True),
        (lambda x, y: (x, x.sum()), (True, False)),
        (lambda x, y: x + jnp.roll(x, 1), False),
        (lambda x, y: x + swap(x), False),
        (lambda x, y: x - x.mean(), False),
        (lambda x, y: jnp.outer(y, y) @ x, False),
        (lambda x, y: jnp.cumsum(x), False),
        (lambda x, y: jnp.fft.rfft(x).real, False),
        (lambda x, y: jnp.take(x, y.astype(int)) ** 2, True),
        (lambda x, y: jnp.roll(x, y[1].astype(int)), True),
        # One function, called at two places.
        (lambda x, y: jnp.take(x, y.astype(int)) + jnp.take(x, 5 - y.astype(int)), False),
        (lambda x, y: jnp.roll(x, y[1].astype(int)) + jnp.roll(x, y[2].astype(int)), False),
        (lambda x, y: part(x, 0) + part(x, 1), False),
        (lambda x, y: part(x, y[0].astype(int)) + part(x, y[1].astype(int)), False),
        (lambda x, y: jax.jit(part)(x, 0) + jax.jit(part)(x, 1), False),
    ],
)
def test_picks_elements(f, expected):
    x = jnp.arange(6.0)
    assert picks_elements(f, x, x) == expected
