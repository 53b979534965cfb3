"""Every structured operation against the dense matrix, computed by NumPy in double precision."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.linalg import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Factor,
    Isotropic,
    by_matrix,
    conjugate_gradient,
    empirical_gaussian,
    truncated_solve,
)

SIZE = 6
DTYPE = jnp.zeros(()).dtype
EPS = float(jnp.finfo(DTYPE).eps)
TOL = 500 * EPS

Pair = tuple[Covariance, np.ndarray]


def assert_close(actual: jax.Array, desired: np.ndarray, tol: float = TOL) -> None:
    """Compare relative to the largest entry: single ones may cancel."""
    assert actual.dtype == DTYPE
    scale = max(1.0, float(np.abs(desired).max()))
    np.testing.assert_allclose(actual, desired, rtol=tol, atol=tol * scale)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape), DTYPE)


def positive(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(0.3, 2.0, size=shape), DTYPE)


def diag(variances: np.ndarray) -> np.ndarray:
    return np.asarray(variances, float)[..., None] * np.eye(variances.shape[-1])


def gram(factor: np.ndarray) -> np.ndarray:
    factor = np.asarray(factor, float)
    return factor @ np.swapaxes(factor, -1, -2)


def isotropic(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variance = positive(seed, *batch)
    matrix = np.asarray(variance, float)[..., None, None] * np.eye(size)
    return Isotropic(jnp.asarray(variance), size), matrix


def diagonal(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances = positive(seed, *batch, size)
    return Diagonal(jnp.asarray(variances)), diag(variances)


def low_rank(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances, factor = positive(seed, *batch, size), normal(seed + 1, *batch, size, 2)
    cov = DiagonalPlusLowRank(jnp.asarray(variances), jnp.asarray(factor))
    return cov, diag(variances) + gram(factor)


def shared_factor(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances, factor = positive(seed, *batch, size), normal(seed + 1, size, 2)
    cov = DiagonalPlusLowRank(jnp.asarray(variances), jnp.asarray(factor))
    return cov, diag(variances) + gram(factor)


def dense(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    matrix = gram(normal(seed, *batch, size, size)) + 0.3 * np.eye(size)
    return Dense.from_matrix(jnp.asarray(matrix, DTYPE)), matrix


def blocks(*batch: int, seed: int = 0) -> Pair:
    parts = [
        low_rank(*batch, seed=seed, size=3),
        isotropic(seed=seed + 2, size=1),
        dense(*batch, seed=seed + 3, size=2),
    ]
    matrix, start = np.zeros((*batch, SIZE, SIZE)), 0
    for cov, part in parts:
        end = start + cov.size
        matrix[..., start:end, start:end] = part
        start = end
    return Blocks(tuple(cov for cov, _ in parts)), matrix


CASES = [isotropic, diagonal, low_rank, shared_factor, dense, blocks]
Make = Callable[..., Pair]
over_cases = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
over_batches = pytest.mark.parametrize("batch", [(), (3,)], ids=str)


@jax.jit
def measure(cov: Covariance, v: jax.Array) -> dict[str, jax.Array]:
    """Compute everything that a covariance has to say, in one compilation."""
    return {
        "dense": cov.dense(),
        "diagonal": cov.diagonal(),
        "trace": cov.trace(),
        "logdet": cov.logdet(),
        "max_eigenvalue": cov.max_eigenvalue(),
        "matvec": cov.matvec(v),
        "solve": cov.solve(v),
        "root": jax.vmap(cov.sqrt_matvec, out_axes=-1)(jnp.eye(SIZE)),
        "sandwich": cov.sandwich(v[..., None, :] * jnp.arange(1.0, 3.0)[:, None]),
    }


def check(cov: Covariance, matrix: np.ndarray, v: np.ndarray) -> None:
    """Compare everything that a covariance has to say with the dense matrix."""
    actual = measure(cov, v)
    assert cov.size == SIZE
    assert_close(actual["dense"], matrix)
    assert_close(actual["diagonal"], np.diagonal(matrix, axis1=-2, axis2=-1))
    assert_close(actual["trace"], np.trace(matrix, axis1=-2, axis2=-1))
    assert_close(actual["logdet"], np.linalg.slogdet(matrix)[1])
    assert_close(actual["matvec"], np.einsum("...ij,...j->...i", matrix, v))
    assert_close(actual["solve"], np.linalg.solve(matrix, v[..., None])[..., 0])
    assert_close(actual["root"] @ actual["root"].mT, matrix)
    square = np.einsum("...i,...ij,...j->...", v, matrix, v)[..., None, None]
    assert_close(actual["sandwich"], square * np.array([[1.0, 2.0], [2.0, 4.0]]))
    largest = np.linalg.eigvalsh(matrix)[..., -1]
    assert actual["max_eigenvalue"].shape == largest.shape
    if isinstance(cov, DiagonalPlusLowRank | Blocks):
        assert np.all(actual["max_eigenvalue"] >= largest * (1 - TOL))
        assert np.all(actual["max_eigenvalue"] <= largest + actual["diagonal"].max(-1))
    else:
        assert_close(actual["max_eigenvalue"], largest)


@over_cases
@over_batches
class TestCovariance:
    def test_agrees_with_the_matrix(self, make: Make, batch: tuple[int, ...]):
        check(*make(*batch), normal(9, 2, *batch, SIZE))

    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("name", ["scale", "shift", "harmonic"])
    def test_noise_levels(self, make: Make, batch: tuple[int, ...], name: str, batched: bool):
        cov, matrix = make(*batch)
        v = positive(8, *(batch or (3,)) if batched else ())
        v_eye = np.asarray(v, float)[..., None, None] * np.eye(SIZE)
        match name:
            case "scale":
                desired, result = v_eye @ matrix, cov.scale(v)
            case "shift":
                desired, result = matrix + v_eye, cov.shift(v)
            case _:
                desired = np.linalg.inv(np.linalg.inv(matrix) + np.linalg.inv(v_eye))
                result = cov.harmonic(v)
        assert type(result) is type(cov)
        check(result, desired, normal(9, 2, *desired.shape[:-1]))

    def test_parameters_broadcast_against_one_vector(self, make: Make, batch: tuple[int, ...]):
        cov, matrix = make(*batch)
        v = normal(9, SIZE)
        assert_close(cov.matvec(v), matrix @ v)
        assert_close(cov.solve(v), np.linalg.inv(matrix) @ v)
        assert cov.sqrt_matvec(v).shape == cov.diagonal().shape

    def test_is_a_pytree(self, make: Make, batch: tuple[int, ...]):
        cov, matrix = make(*batch)
        v = normal(9, *batch, SIZE)
        stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), cov)

        @jax.jit
        def transformed(cov: Covariance, stacked: Covariance) -> tuple[jax.Array, jax.Array]:
            scaled, _ = jax.lax.scan(lambda c, _: (c.scale(2.0), None), cov, length=2)
            return scaled.matvec(v), jax.vmap(lambda c: c.matvec(v))(stacked)[1]

        scaled, mapped = transformed(cov, stacked)
        product = np.einsum("...ij,...j->...i", matrix, v)
        assert_close(scaled, 4 * product)
        assert_close(mapped, product)

        treedef = jax.tree.structure(cov)
        holes = jax.tree.unflatten(treedef, [object()] * treedef.num_leaves)
        assert jax.tree.structure(holes) == treedef


@over_cases
@pytest.mark.parametrize(("batch", "others"), [((), ()), ((2, 1), (3,))])
def test_add(make: Make, batch: tuple[int, ...], others: tuple[int, ...]):
    a, matrix = make(*batch)
    pairs = [make_b(*others, seed=20) for make_b in CASES]
    add = jax.jit(lambda a, covs: [(a + b).dense() for b in covs])
    for result, (_, other) in zip(add(a, [b for b, _ in pairs]), pairs, strict=True):
        assert_close(result, matrix + other)


@pytest.mark.parametrize(
    ("make_a", "make_b", "kind"),
    [
        (isotropic, isotropic, Isotropic),
        (isotropic, diagonal, Diagonal),
        (isotropic, low_rank, DiagonalPlusLowRank),
        (isotropic, dense, Dense),
        (isotropic, blocks, Blocks),
        (diagonal, diagonal, Diagonal),
        (diagonal, low_rank, DiagonalPlusLowRank),
        (diagonal, dense, Dense),
        (diagonal, blocks, Blocks),
        (low_rank, low_rank, DiagonalPlusLowRank),
        (low_rank, blocks, Dense),
        (blocks, blocks, Blocks),
    ],
)
def test_add_keeps_structure(make_a: Make, make_b: Make, kind: type[Covariance]):
    (a, _), (b, _) = make_a(), make_b(seed=20)
    assert type(a + b) is kind
    assert type(b + a) is kind


def test_add_blocks_of_other_sizes():
    a, b = (Blocks((Isotropic(1.0, n), Isotropic(2.0, 5 - n))) for n in (2, 3))
    assert_close((a + b).dense(), np.diag([2.0, 2.0, 3.0, 4.0, 4.0]))


def test_add_refuses_other_sizes():
    with pytest.raises(ValueError, match="one size, got 2 and 3"):
        Isotropic(1.0, 2) + Isotropic(1.0, 3)


def test_dense_clips_negative_eigenvalues():
    cov = Dense.from_matrix(jnp.diag(jnp.array([-EPS, 1.0, 2.0])))
    assert cov.eigenvalues.min() == 0
    assert_close(cov.shift(0.5).solve(jnp.ones(3)), 1 / np.array([0.5, 1.5, 2.5]))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_dense_refuses_what_is_not_square(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"shape \(\*batch, size, size\), got"):
        Dense.from_matrix(jnp.ones(shape))


def test_singular_low_rank():
    """Constant coordinates, and some without variance of their own, as in images."""
    factor = normal(0, SIZE, 2)
    factor[0] = 0
    variances = np.array([0.0, 0.0, 1.0, 1.0, 0.5, 0.0], DTYPE)
    matrix = diag(variances) + gram(factor)
    cov = DiagonalPlusLowRank(jnp.asarray(variances), jnp.asarray(factor))
    v = normal(1, SIZE)
    assert_close(cov.shift(0.1).solve(v), np.linalg.solve(matrix + 0.1 * np.eye(SIZE), v))
    posterior = cov.harmonic(0.1)
    harmonic = 0.1 * np.linalg.solve(matrix + 0.1 * np.eye(SIZE), matrix)
    assert_close(posterior.dense(), harmonic)
    for c, desired in ((cov, matrix), (posterior, harmonic)):
        root = jax.vmap(c.sqrt_matvec, out_axes=-1)(jnp.eye(SIZE))
        assert_close(root @ root.T, desired, 10 * EPS**0.5)


@pytest.mark.parametrize("variance", [1e-6, 1e6])
@over_cases
def test_harmonic_limits(make: Make, variance: float):
    cov, matrix = make()
    limit = variance * np.eye(SIZE) if variance < 1 else matrix
    assert_close(cov.harmonic(variance).dense() / limit.max(), limit / limit.max(), 1e-4)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_factor(batch: tuple[int, ...]):
    matrix = gram(normal(0, *batch, SIZE, SIZE)) + 0.5 * np.eye(SIZE)
    factor = Factor.of(jnp.asarray(matrix, DTYPE))
    v = normal(1, 4, *batch, SIZE)  # four vectors share each factor
    assert_close(factor.solve(v), np.linalg.solve(matrix, v[..., None])[..., 0], 100 * TOL)
    assert_close(factor.logdet(), np.linalg.slogdet(matrix)[1])
    lower = np.linalg.cholesky(matrix)
    assert_close(factor.sqrt_matvec(v), (lower @ v[..., None])[..., 0])


class TestEmpiricalGaussian:
    def test_dense(self):
        x = normal(0, 50, SIZE) @ normal(1, SIZE, SIZE) + 3
        mean, cov = empirical_gaussian(jnp.asarray(x))
        assert isinstance(cov, Dense)
        assert_close(mean, x.mean(0, dtype=float))
        assert_close(cov.dense(), np.cov(x, rowvar=False))

    def test_low_rank(self):
        """Two strong factors in noise: only off-diagonals of the noise are lost."""
        num, size = 500, 40
        factor = 3 * normal(0, size, 2)
        x = normal(1, num, 2) @ factor.T + 0.1 * normal(2, num, size) - 2
        mean, cov = empirical_gaussian(jnp.asarray(x), rank=2, max_dense=10)
        assert isinstance(cov, DiagonalPlusLowRank)
        assert cov.factor.shape == (size, 2)
        sample = np.cov(x, rowvar=False)
        assert_close(mean, x.mean(0, dtype=float))
        assert_close(cov.diagonal(), np.diag(sample))
        eigenvalues, eigenvectors = np.linalg.eigh(sample)
        top = eigenvectors[:, -2:] * np.sqrt(eigenvalues[-2:])
        assert_close(cov.factor @ cov.factor.T, top @ top.T, 100 * EPS**0.5)
        assert np.abs(cov.dense() - sample).max() < eigenvalues[-3] + TOL * eigenvalues[-1]

    def test_few_draws_and_constant_coordinates(self):
        x = normal(0, 3, 20)
        x[:, :5] = 1
        _, cov = jax.jit(partial(empirical_gaussian, max_dense=0))(jnp.asarray(x))
        sample = np.cov(x, rowvar=False)
        assert_close(cov.diagonal(), np.diag(sample))
        assert_close(cov.dense(), sample, 10 * EPS**0.5)
        assert np.all(np.isfinite(cov.shift(0.1).solve(jnp.ones(20))))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"shape \(n, d\), got an array of shape \(1, 3\)"):
            empirical_gaussian(jnp.ones((1, 3)))
        with pytest.raises(ValueError, match="rank of at least 1, got 0"):
            empirical_gaussian(jnp.ones((4, 3)), rank=0)


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

    def test_many_batches_at_once_end(self):
        program = """
import jax
import jax.numpy as jnp
from numpyro_diffprior.linalg import by_matrix

def step(matrices, _):
    factors = [by_matrix(jnp.linalg.cholesky, a @ a.mT + 32 * jnp.eye(32)) for a in matrices]
    return [jnp.tanh(factor) for factor in factors], None

matrices = list(jax.random.normal(jax.random.key(0), (4, 256, 32, 32)))
jax.block_until_ready(jax.jit(lambda x: jax.lax.scan(step, x, length=200)[0])(matrices))
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
