"""Solvers against dense solutions, computed by NumPy in double precision."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
from tests.oracles import spd


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


class Update(NamedTuple):
    """Events of easy and of hard updates, one of which has nothing to learn."""

    cov: np.ndarray
    precision: np.ndarray
    score: np.ndarray

    def solve(self, **options):
        return update(self.cov, self.precision, self.score, **options)

    @property
    def b(self) -> np.ndarray:
        matrix = np.eye(self.cov.shape[-1]) + self.precision @ self.cov
        return np.linalg.solve(matrix, self.score[..., None])[..., 0]

    @property
    def condition(self) -> np.ndarray:
        """The condition number of the preconditioned system."""
        matrix = np.eye(self.cov.shape[-1]) + self.precision @ self.cov
        spectrum = np.abs(np.linalg.eigvals(matrix))
        return spectrum.max(-1) / spectrum.min(-1)


def by_covariance(cov):
    """The preconditioner that is the covariance itself."""
    return lambda r: (r, cov(r))


def update(cov, precision, score, *, atol=0.0, **options):
    return conjugate_gradient(
        operator(precision), by_covariance(operator(cov)), jnp.asarray(score), atol=atol, **options
    )


def make_updates(size: int = 8) -> Update:
    rng = np.random.default_rng(0)
    cov = np.stack([spd(rng, size, 0.1, 3.0) for _ in range(5)])
    rows = rng.normal(size=(5, 3, size))
    noise = np.array([1.0, 1e-1, 1e-2, 1e-3, 1.0])[:, None, None]
    precision = np.swapaxes(rows, -1, -2) @ rows / noise
    values = normal(1, 5, 3) * np.array([1, 1e-4, 1e3, 1, 0], DTYPE)[:, None]
    return Update(cov, precision, np.einsum("nmi,nm->ni", rows, values).astype(DTYPE))


class TestConjugateGradient:
    def test_each_event_gets_what_it_would_get_alone(self):
        problem = make_updates()
        batched = problem.solve()
        for i, (cov, precision, score) in enumerate(zip(*problem, strict=True)):
            alone = update(cov, precision, score)
            assert batched.num_steps[i] == alone.num_steps
            norm = np.linalg.norm(problem.b[i]) + 1e-30
            tol = 100 * EPS * problem.condition[i]
            assert np.linalg.norm(batched.b[i] - alone.b) <= tol * norm

    def test_solves_under_jit_and_vmap(self):
        problem = make_updates()
        jitted = jax.jit(partial(update, max_steps=100))
        mapped = jax.vmap(partial(update, max_steps=100))
        arrays = [jnp.asarray(a, DTYPE) for a in problem]
        for result in (jitted(*arrays), mapped(*arrays)):
            bound = 100 * EPS * problem.condition * np.linalg.norm(problem.b, axis=-1)
            assert np.all(np.linalg.norm(result.b - problem.b, axis=-1) <= bound)
            shift = np.einsum("nij,nj->ni", problem.cov, result.b)
            np.testing.assert_allclose(result.shift, shift, rtol=1e3 * EPS, atol=1e3 * EPS)

    def test_one_step_per_observed_value(self):
        """The precision has rank three: so many steps are enough in exact arithmetic."""
        problem, num_steps = make_updates(), []
        for cov, precision, score, b in zip(*problem, problem.b, strict=True):
            energy = np.sqrt(score @ cov @ b)
            num_steps.append(int(update(cov, precision, score, atol=1e-4 * energy).num_steps))
        assert max(num_steps[:2]) <= 3
        assert max(num_steps) <= 6
        assert num_steps[4] == 0

    @pytest.mark.parametrize(
        ("num_observed", "noise", "known"),
        [
            (20, 1.0, 0.0),
            (60, 1e-2, 0.0),
            (20, 1e-3, 0.0),
            (20, 1.0, 0.5),
            (60, 1e-2, 0.5),
            (20, 1.0, 1.6),
            (60, 1e-2, 1.6),
        ],
    )
    def test_the_error_is_in_deviations_of_the_posterior(self, num_observed, noise, known):
        """At most what was asked for, however precise the observations, with a part of them
        known to the preconditioner, or more than there is of them."""
        rng, size, num = np.random.default_rng(1), 40, 50
        cov = spd(rng, size, 1e-3, 1.0)
        root = np.linalg.cholesky(cov)
        matrix = rng.normal(size=(num, num_observed, size)) * 0.8 ** np.arange(size)
        x = rng.normal(size=(num, size)) @ root.T
        y = np.einsum("nij,nj->ni", matrix, x) + noise * rng.normal(size=(num, num_observed))
        factor = matrix / noise
        score = np.einsum("nji,nj->ni", factor, y / noise)
        gram = np.einsum("nki,nkj->nij", factor, factor)
        inverse = np.linalg.inv(cov) + gram
        exact = np.linalg.solve(inverse, score[..., None])[..., 0]
        update = np.linalg.inv(np.linalg.inv(cov) + known * gram)
        b = np.linalg.solve(cov, update)
        for atol in (0.1, 0.01):
            found = conjugate_gradient(
                operator(factor),
                lambda r: (operator(b)(r), operator(update)(r)),
                jnp.asarray(y / noise, DTYPE),
                transpose=operator(np.swapaxes(factor, -1, -2)),
                least=min(1, 1 / known) if known else 1.0,
                atol=atol,
                max_steps=1000,
            )
            error = np.asarray(found.shift, float) - exact
            norm = np.sqrt(np.einsum("ni,nij,nj->n", error, inverse, error))
            assert norm.max() < atol
            assert norm.max() > 0.01 * atol  # it does not take many more steps than needed

    def test_residual_is_that_of_the_solution(self):
        problem = make_updates()
        result = problem.solve(max_steps=2)
        error = problem.score - result.b - np.einsum("nij,nj->ni", problem.precision, result.shift)
        norm = np.linalg.norm(problem.score, axis=-1)
        expected = np.linalg.norm(error, axis=-1) / np.where(norm == 0, 1, norm)
        np.testing.assert_allclose(result.residual, expected, rtol=0.01, atol=100 * EPS)
        assert np.all(result.residual[1:4] > 1e-3)

    def test_the_covariance_is_applied_once_per_step(self):
        problem, calls = make_updates(), []

        def covariance(v):
            jax.debug.callback(lambda: calls.append(None))
            return operator(problem.cov)(v)

        for max_steps in (2, 16):
            calls.clear()
            result = jax.jit(
                lambda score, max_steps=max_steps: conjugate_gradient(
                    operator(problem.precision),
                    by_covariance(covariance),
                    score,
                    atol=0,
                    max_steps=max_steps,
                )
            )(jnp.asarray(problem.score))
            jax.effects_barrier()
            # Once more to see that nothing is left.
            assert len(calls) == np.max(result.num_steps) + (max_steps > 2)

    @pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
    def test_units_do_not_matter(self, unit: float):
        """Of a covariance in their square, and a precision in its inverse."""
        problem = make_updates()
        plain = problem.solve(max_steps=2)
        scaled = update(
            unit**2 * problem.cov,
            problem.precision / unit**2,
            problem.score / np.asarray(unit, DTYPE),
            max_steps=2,
        )
        assert scaled.num_steps.tolist() == plain.num_steps.tolist()
        assert_close(scaled.residual, plain.residual)
        norm = np.linalg.norm(plain.b, axis=-1, keepdims=True) + 1e-30
        assert_close(unit * scaled.b / norm, plain.b / norm)
        norm = np.linalg.norm(plain.shift, axis=-1, keepdims=True) + 1e-30
        assert_close(scaled.shift / unit / norm, plain.shift / norm)

    @pytest.mark.parametrize("is_factored", [False, True])
    @pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
    def test_starts_from_as_much_of_a_guess_as_is_of_use(self, is_factored, unit):
        """From the solution, its multiples, near it, anywhere, nowhere, and from no numbers."""
        rng, size = np.random.default_rng(2), 40
        cov = spd(rng, size, 1e-2, 1.0)
        factor = 10 * rng.normal(size=(20, size)) * 0.9 ** np.arange(size)
        values = factor @ np.linalg.cholesky(cov) @ rng.normal(size=size) + rng.normal(size=20)
        score = factor.T @ values
        system = np.linalg.inv(cov) + factor.T @ factor
        exact = np.linalg.solve(system, score)
        b = np.linalg.solve(cov, exact)
        deviation = np.linalg.inv(np.linalg.cholesky(system)).T @ rng.normal(size=size)
        near = b + np.linalg.solve(cov, 0.01 * deviation)
        guesses = np.stack([b, -3e5 * b, near, rng.normal(size=size), 0 * b, np.nan * b])
        factor, cov = factor / unit, unit**2 * cov
        plain = (operator(factor.T @ factor), score / unit, None)
        product, given, transpose = (
            (operator(factor), values, operator(factor.T)) if is_factored else plain
        )
        start = jnp.asarray(guesses / unit, DTYPE)
        result = conjugate_gradient(
            product,
            by_covariance(operator(cov)),
            jnp.broadcast_to(jnp.asarray(given, DTYPE), (len(guesses), len(given))),
            transpose=transpose,
            start=(start, operator(cov)(start)),
            atol=0.01,
        )
        error = np.asarray(result.shift, float) / unit - exact
        assert np.sqrt(np.einsum("ni,ij,nj->n", error, system, error)).max() < 0.02
        assert_close(result.shift / unit, operator(cov)(result.b) / unit, 1e-3)
        steps = np.asarray(result.num_steps)
        cold = steps[4]
        assert steps[5] == cold
        assert np.all(steps[:2] <= 1)
        assert steps[2] < cold
        assert steps[3] < 1.25 * cold

    def test_scalar_batch_and_zero_score(self):
        result = update(np.eye(3), np.eye(3), np.ones(3, DTYPE))
        assert_close(result.b, np.full(3, 0.5))
        assert result.residual.shape == result.num_steps.shape == ()
        zero = update(np.eye(3), np.eye(3), np.zeros((2, 3), DTYPE))
        assert np.all(zero.b == 0)
        assert np.all(zero.residual == 0)
        assert np.all(zero.num_steps == 0)

    def test_stops_before_negative_prior_variance(self):
        """Prior variance 1, -0.5 and -2, of one event each, in noise of variance 1."""
        variance = jnp.array([[1.0], [-0.5], [-2.0]])
        result = conjugate_gradient(
            lambda v: v, by_covariance(lambda v: variance * v), jnp.ones((3, 4)), atol=0
        )
        assert_close(result.b[:, 0], np.array([0.5, 0.0, 0.0]))
        assert_close(result.residual, np.array([0.0, 1.0, 1.0]))
        assert result.num_steps.tolist() == [1, 0, 0]

    def test_a_log_density_that_is_not_concave_gets_one_step_without_its_curvature(self):
        curvature = jnp.array([[1.0], [-0.5], [-2.0]])
        result = conjugate_gradient(
            lambda v: curvature * v, by_covariance(lambda v: 0.7 * v), jnp.ones((3, 4)), atol=0
        )
        assert_close(result.b[:, 0], np.array([1 / 1.7, 1.0, 1.0]))
        assert_close(result.shift, 0.7 * result.b)
        assert result.num_steps.tolist() == [1, 1, 1]

    def test_nan_stays_with_its_event(self):
        score = np.array([[1.0, 2.0], [np.nan, 1.0]], DTYPE)
        result = update(np.eye(2), np.eye(2), score)
        assert_close(result.b[0], np.array([0.5, 1.0]))
        assert np.isnan(result.residual[1])

    def test_never_raises_the_energy(self):
        """A covariance that is far from symmetric, on which the plain iteration runs away."""
        rng = np.random.default_rng(0)
        size = 12
        root, skew = rng.normal(size=(2, size, size))
        cov = np.eye(size) + root @ root.T / size + 2 * (skew - skew.T)
        score = rng.normal(size=(64, size)).astype(DTYPE)
        results = [update(cov, np.eye(size), score, max_steps=k) for k in range(2 * size)]
        energies = []
        for result in results:
            # In the norm of the covariance, of which energy is the quadratic form.
            moved = result.b + result.shift
            quadratic = np.sum(np.asarray(result.shift) * np.asarray(moved), axis=-1)
            energies.append(quadratic / 2 - np.sum(score * np.asarray(result.shift), axis=-1))
        assert np.all(np.diff(energies, axis=0) <= 1e-3)
        assert np.all(np.isfinite(energies[-1]))


def truncated_oracle(
    gain: np.ndarray, noise: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, float, int]:
    """Solve in the eigenbasis of ``N^{-1} G``, by the general (non-symmetric) eigensolver."""
    gain = (gain + gain.T) / 2
    eigenvalues, right = np.linalg.eig(np.linalg.solve(noise, gain))
    left = np.linalg.inv(right)
    kept = np.where(eigenvalues > 0, 1 / (1 + eigenvalues), 0)
    solution = (right * kept) @ left @ np.linalg.solve(noise, r)
    logdet = np.linalg.slogdet(noise)[1] + np.log1p(np.maximum(eigenvalues, 0)).sum()
    return solution, logdet, int((eigenvalues <= 0).sum())


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
            solution, logdet, num = expected
            assert 0 < num < SIZE
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


def test_truncated_directions_get_no_correction():
    gain = jnp.diag(jnp.array([1.0, 0.0, -0.5, -3.0]))
    result = truncated_solve(gain, Isotropic(1.0, 4), jnp.ones(4))
    assert_close(result.solution, np.array([0.5, 0.0, 0.0, 0.0]))
    assert_close(result.logdet, np.log(2.0))
    assert result.num_truncated == 2  # nothing is lost with the direction of no gain


def test_truncated_solve_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"noise of size 3, got \(2, 2\) and \(3,\)"):
        truncated_solve(jnp.eye(2), Isotropic(1.0, 3), jnp.ones(3))
