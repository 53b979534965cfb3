"""Every structured operation against the dense matrix, computed by NumPy in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
)
from numpyro_diffprior.linalg.empirical import (
    StationaryLowRankSummary,
    _shrink_spikes,
    empirical_gaussian,
    stationary_gaussian,
    stationary_low_rank_gaussian,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank
from tests.covariances import (
    CASES,
    DTYPE,
    EPS,
    SIZE,
    TOL,
    Make,
    assert_close,
    blocks,
    dense,
    diag,
    diagonal,
    gram,
    isotropic,
    low_rank,
    normal,
    over_batches,
    over_cases,
    positive,
)


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
    if isinstance(cov, DiagonalPlusLowRank | StationaryPlusLowRank | Blocks):
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
    @pytest.mark.parametrize("name", ["scale", "noisy", "denoised"])
    def test_noise_levels(self, make: Make, batch: tuple[int, ...], name: str, batched: bool):
        cov, matrix = make(*batch)
        v = positive(8, *(batch or (3,)) if batched else ())
        v_eye = np.asarray(v, float)[..., None, None] * np.eye(SIZE)
        match name:
            case "scale":
                desired, result = v_eye @ matrix, cov.scale(v)
            case "noisy":
                desired, result = matrix + v_eye, cov.noisy(v)
            case _:
                desired = np.linalg.inv(np.linalg.inv(matrix) + np.linalg.inv(v_eye))
                result = cov.conditional(v)
        assert type(result) is type(cov)
        check(result, desired, normal(9, 2, *desired.shape[:-1]))

    def test_parameters_broadcast_against_one_vector(self, make: Make, batch: tuple[int, ...]):
        cov, matrix = make(*batch)
        v = normal(9, SIZE)
        assert_close(cov.matvec(v), matrix @ v)
        assert_close(cov.solve(v), np.linalg.inv(matrix) @ v)
        assert cov.sqrt_matvec(v).shape == cov.diagonal().shape

    def test_whitening_undoes_the_root(self, make: Make, batch: tuple[int, ...]):
        cov, _ = make(*batch)
        v = normal(9, *batch, SIZE)
        assert_close(cov.sqrt_matvec(cov.whiten(v)), v, 10 * TOL)
        assert_close(cov.whiten(cov.sqrt_matvec(v)), v, 10 * TOL)

    def test_leading_coordinates(self, make: Make, batch: tuple[int, ...]):
        cov, matrix = make(*batch)
        assert cov.leading(4).size == 4
        assert_close(cov.leading(4).dense(), matrix[..., :4, :4])

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


def test_add_keeps_stationary_fields_of_one_channel():
    power = jnp.asarray([[3.0, 1.0, 0.5, 1.0], [1.0, 2.0, 4.0, 2.0]])
    a, b = (Stationary(p, jnp.eye(1), (4,)) for p in power)
    assert isinstance(a + b, Stationary)
    assert_close((a + b).dense(), a.dense() + b.dense())


def test_add_refuses_other_sizes():
    with pytest.raises(ValueError, match="one size, got 2 and 3"):
        Isotropic(1.0, 2) + Isotropic(1.0, 3)


def test_dense_clips_negative_eigenvalues():
    cov = Dense.from_matrix(jnp.diag(jnp.array([-EPS, 1.0, 2.0])))
    assert cov.eigenvalues.min() == 0
    assert_close(cov.noisy(0.5).solve(jnp.ones(3)), 1 / np.array([0.5, 1.5, 2.5]))


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
    assert_close(cov.noisy(0.1).solve(v), np.linalg.solve(matrix + 0.1 * np.eye(SIZE), v))
    posterior = cov.conditional(0.1)
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
    assert_close(cov.conditional(variance).dense() / limit.max(), limit / limit.max(), 1e-4)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@over_cases
def test_harmonic_in_any_units(make: Make, unit: float):
    cov, _ = make()
    scaled = cov.scale(unit**2).conditional(0.7 * unit**2)
    assert_close(scaled.dense() / unit**2, cov.conditional(0.7).dense())


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
        assert np.all(np.isfinite(cov.noisy(0.1).solve(jnp.ones(20))))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"shape \(n, d\), got an array of shape \(1, 3\)"):
            empirical_gaussian(jnp.ones((1, 3)))
        with pytest.raises(ValueError, match="expected rank >= 1, got 0"):
            empirical_gaussian(jnp.ones((4, 3)), rank=0)


@over_cases
@over_batches
@pytest.mark.parametrize("square", [None, 0.7])
def test_update(make: Make, batch: tuple[int, ...], square: float | None):
    """By a diagonal precision, of which some is zero, for draws that share it."""
    cov, matrix = make(*batch)
    precision = positive(7, *batch, SIZE) * (normal(8, *batch, SIZE) > -0.5)
    score = normal(9, 2, *batch, SIZE) * (precision > 0)
    update = cov.update(jnp.asarray(precision), square)
    b, shift = update.solve(jnp.asarray(score))
    matrix = matrix + (square or 0) * matrix @ matrix
    system = np.eye(SIZE) + precision[..., :, None] * matrix
    exact = np.linalg.solve(system, np.asarray(score, float)[..., None])
    assert_close(b, exact[..., 0])
    assert_close(shift, (matrix @ exact)[..., 0])
    assert_close(update.logdet, np.linalg.slogdet(system)[1])


@pytest.mark.parametrize("square", [None, 1.0])
@pytest.mark.parametrize("diag", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("precision", [1.0, 1e4, 1e8])
def test_update_of_precise_values(diag: float, precision: float, square: float | None):
    """The posterior's mean, where the prior is smooth and observations are precise."""
    factor = normal(0, 40, 3) / 4
    cov = DiagonalPlusLowRank(jnp.full(40, diag, DTYPE), jnp.asarray(factor))
    seen = np.asarray(normal(1, 40) > 0, float)
    matrix = diag * np.eye(40) + gram(factor)
    x = np.asarray(factor, float) @ normal(2, 3) + diag**0.5 * normal(3, 40)
    score = precision * seen * x
    matrix = matrix + (square or 0) * matrix @ matrix
    system = np.eye(40) + precision * seen[:, None] * matrix
    update = cov.update(jnp.asarray(precision * seen, DTYPE), square)
    _, shift = update.solve(jnp.asarray(score, DTYPE))
    np.testing.assert_allclose(shift, matrix @ np.linalg.solve(system, score), atol=1e-3)
    np.testing.assert_allclose(update.logdet, np.linalg.slogdet(system)[1], rtol=1e-4)


def test_update_of_large_events():
    """Events that share a covariance, with more elements than one product of pairs takes."""
    size, rank = 10_000, 3
    diag, factor = positive(0, size), normal(1, size, rank) / 50
    precision = positive(2, 2, size)
    update = DiagonalPlusLowRank(jnp.asarray(diag), jnp.asarray(factor)).update(
        jnp.asarray(precision)
    )
    gains = 1 + np.asarray(precision, float) * diag
    small = [np.eye(rank) + factor.T @ (p / g * factor.T).T for p, g in zip(precision, gains)]
    exact = np.log(gains).sum(-1) + np.linalg.slogdet(np.array(small))[1]
    np.testing.assert_allclose(update.logdet, exact, rtol=1e-5)


@pytest.mark.parametrize("grid", [(4, 3), (3, 4), (5,)], ids=str)
def test_stationary_fit_is_the_sample_covariance_averaged_over_shifts(grid: tuple[int, ...]):
    num_axes, channels = len(grid), 2
    x = normal(0, 7, *grid, channels) * np.array([1.0, 3.0], DTYPE) + 2
    x[..., 1] += 0.5 * x[..., 0]
    mean, cov = stationary_gaussian(jnp.asarray(x), num_axes=num_axes)
    assert_close(mean, x.mean(0))
    centered = np.asarray(x - x.mean(0), float)
    axes = tuple(range(1, 1 + num_axes))
    shifts = [np.roll(centered, shift, axes).reshape(7, -1) for shift in np.ndindex(*grid)]
    total = sum(v.T @ v for v in shifts) / (6 * len(shifts))
    # Rotated channels are uncorrelated at each point; what is left at other shifts is dropped.
    size = int(np.prod(grid))
    rotation = np.kron(np.eye(size), np.asarray(cov.rotation, float))
    rotated = rotation.T @ total @ rotation
    same_channel = np.tile(np.eye(channels, dtype=bool), (size, size))
    desired = rotation @ np.where(same_channel, rotated, 0) @ rotation.T
    assert_close(cov.dense(), desired, 5 * TOL)
    at_points = [rotated[i : i + channels, i : i + channels] for i in range(0, 2 * size, channels)]
    assert_close(jnp.asarray(sum(at_points)[0, 1], DTYPE), 0.0, 5 * TOL)


def draws_with_factors(num: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Fields of two channels with a smooth spectrum and two factors, and their covariance."""
    grid, size = (6, 5), 60
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(6), np.fft.fftfreq(5), indexing="ij"))
    power = np.repeat((noise / (0.2 + frequency)).ravel(), 2)
    cov = Stationary(jnp.asarray(power, DTYPE), jnp.eye(2, dtype=DTYPE), grid)
    factor = normal(0, size, 2) * np.array([1.0, 2.0], DTYPE)
    matrix = np.asarray(cov.dense(), float) + gram(factor)
    x = normal(1, num, size) @ np.linalg.cholesky(matrix).T
    return np.asarray(x, DTYPE).reshape(num, *grid, 2) + 3, matrix


def test_stationary_fit_with_factors():
    x, matrix = draws_with_factors(4000, noise=0.1)
    mean, cov = jax.jit(partial(stationary_low_rank_gaussian, rank=4))(jnp.asarray(x))
    assert_close(mean, x.mean(0))
    error = np.asarray(cov.dense()) - matrix
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(matrix)
    # Beside two large directions, all others have the power that their frequency has.
    rest = error - np.asarray(stationary_gaussian(jnp.asarray(x))[1].dense()) + matrix
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(rest)
    assert np.sum(np.abs(cov.factor).max(0) > 0.01) == 2
    _, single = stationary_low_rank_gaussian(jnp.asarray(x[:, 0, :, 0]), rank=99, num_axes=1)
    assert single.factor.shape == (5, 5)


def test_factors_are_not_fitted_to_noise():
    """Of fewer draws than elements the largest variances are by chance."""
    x = normal(0, 40, 8, 8)
    _, cov = stationary_low_rank_gaussian(jnp.asarray(x), rank=8)
    assert np.abs(cov.factor).max() == 0
    # The variance of a direction that stands out is not overestimated.
    direction = normal(1, 64) / np.linalg.norm(normal(1, 64))
    x = x.reshape(40, 64) + 4 * normal(2, 40, 1) * direction
    _, cov = stationary_low_rank_gaussian(jnp.asarray(x.reshape(40, 8, 8)), rank=8)
    largest = np.linalg.eigvalsh(cov.dense())[-1]
    sample = np.linalg.eigvalsh(np.cov(x.T))[-1]
    assert 0.5 * 17 < largest < sample
    assert np.sum(np.abs(cov.factor).max(0) > 0) == 1


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_eigenvalues_of_few_draws(ratio: float):
    """The variance from which an eigenvalue comes, times the cosine of its direction."""
    variance = 1 + ratio**0.5 * np.array([1.01, 2.0, 50.0])
    excess = variance - 1
    eigenvalue = variance * (1 + ratio / excess)
    cosine = (1 - ratio / excess**2) / (1 + ratio / excess)
    found = _shrink_spikes(jnp.asarray(eigenvalue, DTYPE), ratio)
    assert_close(found, 1 + excess * cosine, 1e-2 if EPS > 1e-10 else 1e-6)
    assert np.all(_shrink_spikes(jnp.asarray([0.0, 1.0, (1 + ratio**0.5) ** 2]), ratio) == 1)


def test_stationary_fit_needs_a_grid():
    with pytest.raises(ValueError, match="events with 2 grid axes"):
        stationary_gaussian(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="stationary_low_rank_gaussian: expected two draws"):
        stationary_low_rank_gaussian(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="rank"):
        StationaryLowRankSummary(rank=0)
    with pytest.raises(ValueError, match=r"pass num_axes=1"):
        StationaryLowRankSummary(num_axes=2).check((7,))
    with pytest.raises(ValueError, match="two draws or more"):
        stationary_gaussian(jnp.zeros((1, 4, 4)))
