"""Dependence that a program shows."""

import jax
import jax.numpy as jnp
import pytest

from numpyro_diffprior._compile.dependence import depends

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
