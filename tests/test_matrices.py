"""Batches of small matrices against NumPy in double precision."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.linalg.batched import Factor, by_matrix, cholesky, eigh, inverse_lower
from tests.covariances import (
    DTYPE,
    SIZE,
    TOL,
    assert_close,
    gram,
    normal,
)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_factor(batch: tuple[int, ...]):
    matrix = gram(normal(0, *batch, SIZE, SIZE)) + 0.5 * np.eye(SIZE)
    factor = Factor.of(jnp.asarray(matrix, DTYPE))
    v = normal(1, 4, *batch, SIZE)  # four vectors share each factor
    assert_close(factor.solve(v), np.linalg.solve(matrix, v[..., None])[..., 0], 100 * TOL)
    assert_close(factor.logdet(), np.linalg.slogdet(matrix)[1])
    lower = np.linalg.cholesky(matrix)
    assert_close(factor.sqrt_matvec(v), (lower @ v[..., None])[..., 0])


@pytest.mark.parametrize("m", [1, 16, 17, 33, 50, 128, 131, 300])
def test_factors_by_blocks(m: int):
    """Sizes on both sides of those of the blocks, and matrices that have no factor."""
    matrix = gram(normal(0, 2, m, m)) / m + 0.5 * np.eye(m)
    exact = np.linalg.cholesky(matrix)
    lower = cholesky(jnp.asarray(matrix, DTYPE))
    np.testing.assert_allclose(lower, exact, atol=100 * TOL)
    inverse = inverse_lower(jnp.asarray(exact, DTYPE))
    identity = np.broadcast_to(np.eye(m), exact.shape)
    np.testing.assert_allclose(inverse @ exact, identity, atol=100 * TOL)
    np.testing.assert_array_equal(np.triu(inverse, 1), 0)
    np.testing.assert_array_equal(np.triu(lower, 1), 0)
    indefinite = jnp.asarray(matrix - 5 * np.eye(m), DTYPE)
    assert np.isnan(cholesky(indefinite)).any((-2, -1)).all()


@pytest.mark.parametrize("m", [1, 2, 5])
def test_eigh(m: int):
    matrix = gram(normal(0, 7, m, m))
    eigenvalues, eigenvectors = eigh(jnp.asarray(matrix, DTYPE))
    rebuilt = (eigenvectors * eigenvalues[:, None]) @ eigenvectors.mT
    assert_close(rebuilt, matrix)
    assert_close(eigenvectors @ eigenvectors.mT, np.broadcast_to(np.eye(m), matrix.shape))


def test_factors_under_transformations():
    """In a compiled scan under vmap, where constants would be traced."""
    matrix = gram(normal(0, 3, SIZE, SIZE)) + 0.5 * np.eye(SIZE)

    def inverses(matrix: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c, Factor.of(matrix).inverse), 0, length=2)[1]

    found = jax.jit(jax.vmap(inverses))(jnp.asarray(matrix, DTYPE))
    assert_close(found[:, 1], np.linalg.inv(np.linalg.cholesky(matrix)), 100 * TOL)


class TestByMatrix:
    @pytest.mark.parametrize("m", [1, 3, 40])
    @pytest.mark.parametrize("batch", [(), (1,), (50,), (3, 17)])
    def test_is_the_batched_call(self, batch, m):
        root, b = normal(0, *batch, m, m), normal(1, *batch, m, 2)
        matrix = root @ root.mT + m * np.eye(m, dtype=DTYPE)
        found = by_matrix(jnp.linalg.solve, jnp.asarray(matrix), jnp.asarray(b))
        assert_close(found, np.linalg.solve(matrix, b))

    def test_returns_trees_and_differentiates(self):
        root = normal(0, 30, 8, 8)
        matrix = root @ root.mT + np.eye(8, dtype=DTYPE)

        def logdet(matrix: jax.Array) -> jax.Array:
            return jnp.log(by_matrix(jnp.linalg.eigh, matrix).eigenvalues).sum()

        assert_close(jax.grad(logdet)(jnp.asarray(matrix)), np.linalg.inv(matrix))

    def test_an_axis_of_vmap_joins_the_batch(self):
        root, b = normal(0, 3, 5, 4, 4), normal(1, 5, 4, 2)
        matrix = jnp.asarray(root @ root.mT + 4 * np.eye(4, dtype=DTYPE))

        def solve(matrix: jax.Array) -> jax.Array:
            return by_matrix(jnp.linalg.solve, matrix, jnp.asarray(b))

        batched = jax.vmap(jax.vmap(solve))
        one_by_one = jax.vmap(lambda m: by_matrix(jnp.linalg.solve, m, jnp.asarray(b[0])))
        assert_close(jax.jit(jax.vmap(solve))(matrix), np.linalg.solve(matrix, b))
        stacked = jnp.stack([matrix, 2 * matrix])
        assert_close(batched(stacked), np.linalg.solve(stacked, b))
        assert_close(one_by_one(matrix[:, 0]), np.linalg.solve(matrix[:, 0], b[0]))

    @pytest.mark.parametrize("wrap", ["", "jax.vmap"])
    def test_many_batches_at_once_end(self, wrap: str):
        program = f"""
import jax
import jax.numpy as jnp
from numpyro_diffprior.linalg.batched import by_matrix

factor = {wrap}(lambda matrix: by_matrix(jnp.linalg.cholesky, matrix))

def step(matrices, _):
    factors = [factor(a @ a.mT + 32 * jnp.eye(32)) for a in matrices]
    return [jnp.tanh(factor) for factor in factors], None

matrices = list(jax.random.normal(jax.random.key(0), (4, 256, 32, 32)))
jax.block_until_ready(jax.jit(lambda x: jax.lax.scan(step, x, length=200)[0])(matrices))
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
