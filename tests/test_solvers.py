"""Solvers against dense solutions, computed by NumPy in double precision."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.linalg.solvers import (
    conjugate_gradient,
    factored_solve,
    sandwich,
    sandwich_square,
    truncated_solve,
)
from tests.covariances import (
    DTYPE,
    EPS,
    SIZE,
    TOL,
    Make,
    assert_close,
    dense,
    normal,
    over_cases,
)
from tests.oracles import spd, tolerance


@over_cases
def test_factored_solve_shares_factors(make: Make):
    noise, matrix = make(3)
    _, gain = dense(3, seed=7)
    r = normal(6, 4, 3, SIZE)  # four vectors share each factor
    result = jax.jit(factored_solve)(jnp.asarray(gain, DTYPE), noise, r)
    total = np.broadcast_to(matrix, gain.shape) + gain
    assert_close(result.solution, np.linalg.solve(total, r[..., None])[..., 0], 4 * TOL)
    assert_close(result.logdet, np.broadcast_to(np.linalg.slogdet(total)[1], (4, 3)), 4 * TOL)
    assert np.all(result.residual == 0)


def test_factored_solve_raises_a_diagonal_that_rounding_has_spoilt():
    gain = jnp.ones((2, SIZE, SIZE)).at[0].add(jnp.eye(SIZE))
    noise = Isotropic(EPS**2, SIZE)
    r = jnp.asarray(normal(0, 2, SIZE))
    result = factored_solve(gain, noise, r)
    assert result.residual[0] == 0
    assert np.all(np.isfinite(result.solution))
    assert 0 < result.residual[1] <= 1


@pytest.mark.parametrize("rows", [2, SIZE])
@pytest.mark.parametrize("is_diagonal", [False, True])
@over_cases
def test_sandwiches(make: Make, is_diagonal: bool, rows: int):
    cov, matrix = make(3)
    operator = normal(5, 3, rows, SIZE) * (np.eye(rows, SIZE, dtype=DTYPE) if is_diagonal else 1)
    transposed = np.swapaxes(operator, -1, -2)
    assert_close(jax.jit(sandwich)(cov, operator), operator @ matrix @ transposed)
    assert_close(jax.jit(sandwich_square)(cov, operator), operator @ matrix @ matrix @ transposed)


def operator(matrix: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    return lambda v: jnp.einsum("...ij,...j->...i", jnp.asarray(matrix, DTYPE), v)


def hard_and_easy(size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Events of condition number 1 to 1e4, with right-hand sides of any scale, one of them 0."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, size, size)))[0]
    conditions = np.array([1.0, 2.0, 1e2, 1e4, 1e4])
    spectrum = np.stack([np.geomspace(1, 1 / c, size) for c in conditions])
    spectrum *= np.array([1.0, 1e3, 1e-3, 1.0, 1.0])[:, None]
    b = normal(1, 5, size) * np.array([1, 1e-4, 1e3, 1, 0], DTYPE)[:, None]
    return (q * spectrum[:, None, :]) @ np.swapaxes(q, -1, -2), b


class TestConjugateGradient:
    def test_each_event_gets_what_it_would_get_alone(self):
        matrix, b = hard_and_easy()
        solve = jax.jit(lambda matrix, b: conjugate_gradient(operator(matrix), b))
        batched = solve(matrix, b)
        for i in range(len(b)):
            alone = solve(matrix[i], b[i])
            assert batched.num_steps[i] == alone.num_steps
            exact = np.linalg.solve(matrix[i], b[i])
            norm = np.linalg.norm(exact) + 1e-30
            # The iterates of the hardest event are as sensitive to rounding as the problem.
            tol = 20 * EPS * np.linalg.cond(matrix[i])
            assert np.linalg.norm(batched.solution[i] - alone.solution) <= tol * norm

    def test_solves_under_jit_and_vmap(self):
        matrix, b = hard_and_easy()
        exact = np.linalg.solve(matrix, b[..., None])[..., 0]
        solve = partial(conjugate_gradient, rtol=10 * EPS, max_steps=100)
        jitted = jax.jit(lambda m, b: solve(operator(m), b))
        mapped = jax.vmap(lambda m, b: solve(lambda v: m @ v, b))
        for result in (jitted(matrix, b), mapped(jnp.asarray(matrix, DTYPE), jnp.asarray(b))):
            error = np.linalg.norm(result.solution - exact, axis=-1)
            bound = 100 * EPS * np.linalg.cond(matrix) * np.linalg.norm(exact, axis=-1)
            assert np.all(error <= bound)
            assert result.num_steps[0] <= 2
            assert result.num_steps[3] >= 8
            assert np.all(result.residual < 1e3 * EPS * np.array([1, 1, 1, 10, 10]))

    def test_residual_is_that_of_the_solution(self):
        matrix, b = hard_and_easy()
        result = conjugate_gradient(operator(matrix), jnp.asarray(b), max_steps=3)
        assert result.num_steps.tolist() == [1, 3, 3, 3, 0]
        error = b - np.einsum("nij,nj->ni", matrix, result.solution)
        expected = np.linalg.norm(error, axis=-1)[:-1] / np.linalg.norm(b, axis=-1)[:-1]
        np.testing.assert_allclose(result.residual[:-1], expected, rtol=0.01, atol=20 * EPS)
        assert np.all(result.residual[2:4] > 1e-3)

    def test_inner_map_is_applied_once_per_step(self):
        """``M = I + F F^T`` with ``F^T`` the costly part."""
        factor, b = normal(2, 5, 8, 8), normal(3, 5, 8)
        calls = []

        def inner(v):
            jax.debug.callback(lambda: calls.append(None))
            return operator(np.swapaxes(factor, -1, -2))(v)

        def solve(b, max_steps):
            outer = operator(factor)
            return conjugate_gradient(
                lambda v, inner_v: v + outer(inner_v), b, inner=inner, max_steps=max_steps
            )

        matrix = np.eye(8) + factor @ np.swapaxes(factor, -1, -2)
        for max_steps in (2, 16):
            calls.clear()
            result = jax.jit(solve, static_argnums=1)(b, max_steps)
            jax.effects_barrier()
            assert len(calls) == np.max(result.num_steps)
            expected = np.einsum("nij,ni->nj", factor, result.solution)
            np.testing.assert_allclose(result.inner, expected, atol=100 * EPS)
            error = np.linalg.norm(b - np.einsum("nij,nj->ni", matrix, result.solution), axis=-1)
            expected = error / np.linalg.norm(b, axis=-1)
            np.testing.assert_allclose(result.residual, expected, rtol=0.01, atol=100 * EPS)
        exact = np.linalg.solve(matrix, b[..., None])[..., 0]
        np.testing.assert_allclose(result.solution, exact, atol=1e-3)

    @pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
    def test_units_do_not_matter(self, unit: float):
        """Of a matrix in their square, whose own square may be no number."""
        matrix, b = hard_and_easy()
        plain = conjugate_gradient(operator(matrix), jnp.asarray(b), max_steps=4)
        scaled = conjugate_gradient(
            operator(unit**2 * matrix), jnp.asarray(unit * b), max_steps=4, floor=jnp.zeros_like
        )
        assert scaled.num_steps.tolist() == plain.num_steps.tolist()
        assert_close(scaled.residual, plain.residual)
        norm = np.linalg.norm(plain.solution, axis=-1, keepdims=True) + 1e-30
        assert_close(unit * scaled.solution / norm, plain.solution / norm)

    def test_zero_right_hand_side(self):
        result = conjugate_gradient(lambda v: v, jnp.zeros((2, 3)))
        assert np.all(result.solution == 0)
        assert np.all(result.residual == 0)
        assert np.all(result.num_steps == 0)

    def test_scalar_batch(self):
        result = conjugate_gradient(lambda v: 2 * v, jnp.ones(3))
        assert_close(result.solution, np.full(3, 0.5))
        assert result.residual.shape == result.num_steps.shape == ()

    def test_truncates_without_positive_prior_variance(self):
        """Prior variance 1, -0.5 and -2, of one event each, in noise of variance 1."""
        gains = jnp.array([[1.0], [-0.5], [-2.0]])
        b = jnp.ones((3, 4))
        plain = conjugate_gradient(lambda v: (1 + gains) * v, b)
        assert_close(plain.solution[:, 0], np.array([0.5, 2.0, 0.0]))
        floored = conjugate_gradient(lambda v: (1 + gains) * v, b, floor=lambda v: v)
        assert_close(floored.solution[:, 0], np.array([0.5, 0.0, 0.0]))
        assert_close(floored.residual, np.array([0.0, 1.0, 1.0]))
        assert floored.num_steps.tolist() == [1, 0, 0]

    def test_directions_without_gain_are_solved(self):
        """What noise alone explains, or all but rounding of it, is no truncated direction."""
        rng = np.random.default_rng(0)
        noise = spd(rng, 6)
        row = rng.normal(size=6)
        b = rng.normal(size=6)
        b -= row * (row @ b) / (row @ row)
        for gain in (1e-12, 1.0):
            matrix = noise + gain * np.outer(row, row)
            result = conjugate_gradient(
                lambda v, m=jnp.asarray(matrix): m @ v,
                jnp.asarray(b),
                floor=lambda v: jnp.asarray(noise) @ v,
                max_steps=60,
            )
            expected = np.linalg.solve(matrix, b)
            np.testing.assert_allclose(result.solution, expected, atol=tolerance(1e-3, 1e-4))

    def test_nan_stays_with_its_event(self):
        b = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
        result = conjugate_gradient(lambda v: 2 * v, b)
        assert_close(result.solution[0], np.array([0.5, 1.0]))
        assert np.isnan(result.residual[1])


def truncated_oracle(
    gain: np.ndarray, noise: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, float, float, int]:
    """Solve in the eigenbasis of ``N^{-1} G``, by the general (non-symmetric) eigensolver."""
    gain = (gain + gain.T) / 2
    eigenvalues, right = np.linalg.eig(np.linalg.solve(noise, gain))
    left = np.linalg.inv(right)
    kept = np.where(eigenvalues > 0, 1 / (1 + eigenvalues), 0)
    solution = (right * kept) @ left @ np.linalg.solve(noise, r)
    logdet = np.linalg.slogdet(noise)[1] + np.log1p(np.maximum(eigenvalues, 0)).sum()
    positive = (right / (1 + np.maximum(eigenvalues, 0))) @ left @ np.linalg.solve(noise, r)
    return solution, logdet, r @ positive, int((eigenvalues <= 0).sum())


@over_cases
@pytest.mark.parametrize("noise_batch", [(), (3,)], ids=str)
class TestTruncatedSolve:
    solve = staticmethod(jax.jit(truncated_solve))

    def test_indefinite_and_asymmetric(self, make: Make, noise_batch: tuple[int, ...]):
        noise, matrix = make(*noise_batch)
        gain, r = normal(5, 3, SIZE, SIZE), normal(6, 3, SIZE)
        result = self.solve(gain, noise, r)
        matrix = np.broadcast_to(matrix, gain.shape)
        for i in range(3):
            expected = truncated_oracle(np.float64(gain[i]), matrix[i], r[i])
            solution, logdet, quadratic, num = expected
            assert 0 < num < SIZE
            found = r[i] @ result.solution[i] + result.left_out[i]
            assert_close(found, quadratic, 4 * TOL)
            assert_close(result.solution[i], solution, 4 * TOL)
            assert_close(result.logdet[i], logdet, 4 * TOL)
            assert result.num_truncated[i] == num

    def test_positive_definite_is_a_plain_solve(self, make: Make, noise_batch: tuple[int, ...]):
        noise, matrix = make(*noise_batch)
        _, gain = dense(3, seed=7)
        r = normal(6, 3, SIZE)
        result = self.solve(np.asarray(gain, DTYPE), noise, r)
        expected = np.linalg.solve(matrix + gain, r[..., None])[..., 0]
        assert_close(result.solution, expected, 4 * TOL)
        assert_close(result.logdet, np.linalg.slogdet(matrix + gain)[1], 4 * TOL)
        assert np.all(result.num_truncated == 0)
        assert_close(result.left_out, np.zeros(3))


def test_truncated_directions_get_no_correction():
    gain = jnp.diag(jnp.array([1.0, 0.0, -0.5, -3.0]))
    result = truncated_solve(gain, Isotropic(1.0, 4), jnp.ones(4))
    assert_close(result.solution, np.array([0.5, 0.0, 0.0, 0.0]))
    assert_close(result.logdet, np.log(2.0))
    assert_close(result.left_out, 3.0)
    assert result.num_truncated == 2  # nothing is lost with the direction of no gain


def test_truncated_solve_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"noise of size 3, got \(2, 2\) and \(3,\)"):
        truncated_solve(jnp.eye(2), Isotropic(1.0, 3), jnp.ones(3))


def test_conjugate_gradient_never_raises_the_energy():
    """A map that is far from symmetric, on which the plain iteration runs away."""
    rng = np.random.default_rng(0)
    size = 12
    root, skew = rng.normal(size=(2, size, size))
    matrix = jnp.asarray(np.eye(size) + root @ root.T / size + 2 * (skew - skew.T))
    b = jnp.asarray(rng.normal(size=(64, size)))
    energies = []
    for max_steps in range(2 * size):
        result = conjugate_gradient(lambda v: v @ matrix.T, b, max_steps=max_steps)
        quadratic = jnp.einsum("ni,ij,nj->n", result.solution, matrix, result.solution)
        energies.append(quadratic / 2 - jnp.sum(b * result.solution, axis=-1))
    assert np.all(np.diff(energies, axis=0) <= 1e-4)
    assert np.all(jnp.linalg.norm(result.solution, axis=-1) <= 2 * jnp.linalg.norm(b, axis=-1))


def test_conjugate_gradient_goes_on_where_the_residual_grows():
    """The residual's norm may rise far above where it began, on the way to a solution."""
    rng = np.random.default_rng(0)
    values = np.geomspace(1, 1e4, 24)
    vectors = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    matrix = jnp.asarray(vectors * values @ vectors.T)
    b = jnp.asarray(vectors @ np.sqrt(1 / values))
    norms = [
        float(conjugate_gradient(lambda v: v @ matrix, b[None], max_steps=k).residual[0])
        for k in range(8)
    ]
    result = conjugate_gradient(lambda v: v @ matrix, b[None], max_steps=500)
    assert max(norms) > 1
    np.testing.assert_allclose(
        result.solution[0], vectors @ (vectors.T @ b / values), rtol=0, atol=1e-4
    )
