"""The example of a field that drifts with an unknown wind: simulator and exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import advection

SIZE = 4


def test_covariance_given_the_wind_is_that_of_simulated_windows():
    wind = jnp.asarray([0.7, -0.4])
    num = 40_000
    x = advection.simulate_with(jax.random.key(0), jnp.broadcast_to(wind, (num, 2)), SIZE)
    x = np.asarray(x, float).reshape(num, -1)
    expected = np.asarray(advection.covariance(wind, SIZE), float)
    np.testing.assert_allclose(np.diagonal(expected), 1, rtol=1e-5)
    np.testing.assert_allclose(x.T @ x / num, expected, atol=6 * (2 / num) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [1e-6, 0.7])
def test_exact_draws(monkeypatch, deviation):
    """Against the dense posterior of a known wind, and against draws by rejection of winds."""
    monkeypatch.setattr(advection, "WIND", deviation)
    jax.clear_caches()  # programs hold the former value
    rng, noise = np.random.default_rng(0), 0.3
    truth, _ = advection.simulate(jax.random.key(1), 1, SIZE)
    mask = rng.random(truth.shape[1:]) < 0.2
    mask[..., advection.NUM_SEEN :] = False
    y = np.where(mask, truth[0] + noise * rng.normal(size=mask.shape), np.nan)
    draws = advection.draw_exactly(jax.random.key(2), jnp.asarray(mask), y, noise, 40, 4000, 9)
    draws = np.asarray(draws, float).reshape(4000, -1)

    winds = deviation * rng.normal(size=(4000, 2))
    seen, values = np.flatnonzero(mask), y[mask]
    covs = jax.jit(jax.vmap(lambda wind: advection.covariance(wind, SIZE)))(jnp.asarray(winds))
    covs = np.asarray(covs, float)
    gram = covs[:, seen][:, :, seen] + noise**2 * np.eye(len(seen))
    solved = np.linalg.solve(gram, np.broadcast_to(values[:, None], (len(winds), len(seen), 1)))
    log_weights = -0.5 * (values @ solved[..., 0].T + np.linalg.slogdet(gram)[1])
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    gains = covs[:, :, seen]
    means = (gains @ solved)[..., 0]
    mean = weights @ means
    inner = np.diagonal(covs, axis1=1, axis2=2) - np.einsum(
        "nij,nji->ni", gains, np.linalg.solve(gram, gains.swapaxes(1, 2))
    )
    variance = weights @ (inner + (means - mean) ** 2)
    tolerance = 5 * (variance * np.sum(weights**2)) ** 0.5
    assert np.all(np.abs(draws.mean(0) - mean) < tolerance)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.25, atol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*posterior draws do not fit")
def test_example(tmp_path):
    """All methods at a tiny size."""
    args = advection.parse_args(
        "--size 4 --num-windows 32 --num-gaussian-iterations 4 --num-iterations 2 --num-events 16"
        " --num-sgd-steps 4 --batch-size 8 --channels 4 8 --num-steps 4 --num-judged 2"
        f" --num-samples 19 --num-winds 9 --particles 1 2 --output {tmp_path}".split()
    )
    result = advection.main(args)
    names = {"exact", "Gaussian", "learned, 1", "learned, 2", "clean, 1", "clean, 2"}
    for rows in result["table"].values():
        assert set(rows) == names
        assert all(np.isfinite(list(row.values())).all() for row in rows.values())
    assert (tmp_path / "advection.png").exists()
