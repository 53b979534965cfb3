"""Runs that go wrong: what is returned, what is said, and what is refused before it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.denoisers.serialization import load_denoiser, save_denoiser

D, N = 2, 32
Y = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), "float32")
KEY = jax.random.key(0)
GAUSSIAN = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.zeros(D), jnp.eye(D)), sampler=ndp.samplers.DDPM(4)
)


def model(prior, y):
    with numpyro.plate("n", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def make_prior():
    net = ndp.MLP((D,), features=(4,), embedding=4, rngs=nnx.Rngs(0))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.DDPM(4))


def make_em(optimizer, **options):
    return ndp.EM(
        model,
        optimizer,
        e_step=ndp.EStep(num_particles=2),
        m_step=ndp.MStep(num_steps=4, batch_size=16),
        start=ndp.GaussianStart(num_iterations=2),
        **options,
    )


def stationary(power):
    return ndp.linalg.Stationary(power, jnp.eye(1), (4,))


def train(**options):
    state = ndp.training.init_training(make_prior().denoiser, optax.sgd(1e-3))
    options = {"num_steps": 1, "batch_size": 4} | options
    return ndp.training.train(KEY, state, Y, optax.sgd(1e-3), **options)


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if leaf.dtype.kind == "f")


DIVERGING = {
    "a rate that is no number": optax.adam(float("nan")),
    "an infinite rate": optax.sgd(float("inf")),
    "from the third step on": optax.sgd(lambda count: jnp.where(count < 2, 0.01, jnp.nan)),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_run_ends_with_the_last_good_weights(name):
    with pytest.warns(UserWarning, match="training of iteration 1 diverged.*learning rate"):
        result = make_em(DIVERGING[name]).run(KEY, 5, make_prior(), Y, progress_bar=False)
    assert result.history.diverged.tolist() == [True]
    assert is_finite(result.prior.denoiser)
    assert is_finite(result.best.denoiser)
    assert is_finite(result.state.training)
    assert np.all(np.isfinite(result.prior.sample(KEY, (3,))))
    count = 2 if name == "from the third step on" else 0
    assert result.state.training["prior"].num_steps == count


def test_a_gradient_that_is_no_number_is_told():
    """Also where the loss is finite, and the optimizer hides it."""

    def network(params, x, noise):
        return x * jnp.sqrt(params["w"] ** 2)  # at zero, its derivative is zero times infinity

    net = ndp.FunctionNetwork(network, {"w": jnp.zeros(())}, (D,))
    optimizer = optax.chain(optax.zero_nans(), optax.sgd(0.01))
    with pytest.warns(UserWarning, match="diverged at step 1 of 4: its loss, gradient or weights"):
        ndp.fit_denoiser(
            KEY, ndp.NetworkDenoiser(net), Y, optimizer=optimizer, num_steps=4, batch_size=16
        )


def test_a_run_that_diverges_later_keeps_what_was_learned():
    optimizer = optax.sgd(lambda count: jnp.where(count < 6, 0.01, jnp.nan))
    with pytest.warns(UserWarning, match="training of iteration 2 diverged"):
        result = make_em(optimizer).run(
            KEY, 5, make_prior(), Y, heldout=(Y[:8],), progress_bar=False
        )
    assert result.history.diverged.tolist() == [False, True]
    assert np.isfinite(result.history.loss[0])
    assert np.isnan(result.history.loss[1])
    assert is_finite(result.best.denoiser)


def test_fit_denoiser_says_that_it_diverged():
    with pytest.warns(UserWarning, match="diverged at step 1 of 4.*learning rate"):
        result = ndp.fit_denoiser(
            KEY,
            make_prior().denoiser,
            Y,
            optimizer=optax.sgd(jnp.inf),
            num_steps=4,
            batch_size=16,
        )
    assert is_finite(result.denoiser)
    assert np.all(np.isnan(result.losses))


def test_an_interrupted_run_returns_what_it_has():
    def interrupt(state, metrics):
        if state.num_iterations == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted in iteration 3"):
        result = make_em(optax.adam(1e-3)).run(
            KEY, 5, make_prior(), Y, progress_bar=False, callback=interrupt
        )
    assert result.state.num_iterations == 2
    assert result.history.loss.shape == (2,)
    again = make_em(optax.adam(1e-3)).run(KEY, 2, make_prior(), Y, progress_bar=False)
    np.testing.assert_array_equal(result.state.draws["x"], again.state.draws["x"])


def test_an_exception_has_the_state():
    def fail(state, metrics):
        if state.num_iterations == 1:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full") as caught:
        make_em(optax.adam(1e-3)).run(KEY, 5, make_prior(), Y, progress_bar=False, callback=fail)
    state = caught.value.em_state
    assert state.num_iterations == 1
    result = make_em(optax.adam(1e-3)).run(
        KEY, 1, state.prior, Y, progress_bar=False, init_state=state
    )
    assert result.state.num_iterations == 2


class Own(TypeError):
    pass


@pytest.mark.parametrize("error", [TypeError, ValueError, Own, KeyError])
@pytest.mark.parametrize("function", [ndp.sample_posterior, ndp.log_evidence])
def test_the_models_own_errors_are_kept(error, function):
    def broken(prior, y):
        raise error("my own mistake")

    with pytest.raises(error, match="my own mistake"):
        function(KEY, broken, GAUSSIAN, Y, max_batch_size=16)


def test_data_that_are_not_subsampled_are_named():
    """The cause that it is, where the model works on whole plates."""

    def not_subsampled(prior, y):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x + 0 * y, 0.5).to_event(1), obs=x * 0)

    with pytest.raises(ValueError, match=r"parts? of its plates \['n'\].*numpyro.subsample"):
        ndp.sample_posterior(KEY, not_subsampled, GAUSSIAN, Y, max_batch_size=8)


def with_option(prior, y, num_samples=3, kernel=None):
    model(prior, y)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ndp.sample_posterior(KEY, with_option, GAUSSIAN, Y, num_samples=5),
        lambda: ndp.calibrate(KEY, with_option, GAUSSIAN, Y, num_samples=5),
        lambda: ndp.calibrate(KEY, with_option, GAUSSIAN, Y, kernel=jnp.ones(3)),
    ],
)
def test_options_that_the_model_has_as_well(call):
    with pytest.raises(ValueError, match="is an option of this function and an argument"):
        call()


def test_options_of_the_model_by_position_and_by_default():
    for args in ((), (3,)):
        draws = ndp.sample_posterior(KEY, with_option, GAUSSIAN, Y, *args)
        assert draws.samples["x"].shape == (1, N, D)


E, M, S = ndp.EStep, ndp.MStep, ndp.samplers
NUMBERS = {
    "DDIM: expected sigma_min < sigma_max": lambda: S.DDIM(8, sigma_min=10.0, sigma_max=0.01),
    "DDPM: expected sigma_min > 0, got -1": lambda: S.DDPM(sigma_min=-1.0),
    "DDPM: expected sigma_min > 0, got nan": lambda: S.DDPM(sigma_min=float("nan")),
    "DDPM: expected sigma_min > 0, got 0": lambda: S.DDPM(sigma_min=0.0),
    "DDPM: expected sigma_max > 0, got inf": lambda: S.DDPM(sigma_max=float("inf")),
    "DDPM: expected num_steps to be an integer, got 8.0": lambda: S.DDPM(8.0),
    "DDPM: expected num_steps to be an integer, got True": lambda: S.DDPM(True),
    "DDPM: expected a Schedule": lambda: S.DDPM(schedule="linear"),
    "step_size > 0 and <= 1, got -0.1": lambda: S.PredictorCorrector(step_size=-0.1),
    "num_corrections >= 1, got -1": lambda: S.PredictorCorrector(num_corrections=-1),
    "Karras: expected rho > 0, got inf": lambda: ndp.noise.Karras(float("inf")),
    "LogNormal: expected std to be a number": lambda: ndp.noise.LogNormal(std="wide"),
    "MMPS: expected atol > 0, got 0": lambda: ndp.MMPS(atol=0.0),
    "MMPS: expected max_steps >= 1, got 0": lambda: ndp.MMPS(max_steps=0),
    "MMPS: expected a posterior covariance": lambda: ndp.MMPS("Gaussian"),
    "DPS: expected strength >= 0, got -1": lambda: ndp.guidance.DPS(-1.0),
    "Tempered: expected power >= 0 and <= 1, got 2": lambda: ndp.guidance.Tempered(power=2.0),
    "EStep: expected num_draws >= 1, got 0": lambda: E(num_draws=0),
    "EStep: expected max_batch_size >= 1, got -2": lambda: E(max_batch_size=-2),
    "MStep: expected num_steps to be an integer, got 2.5": lambda: M(num_steps=2.5),
    "MStep: expected ema_decay >= 0 and <= 1, got 1.5": lambda: M(ema_decay=1.5),
    "LowRankSummary: expected rank >= 1, got 0": lambda: ndp.linalg.LowRankSummary(0),
    "ParamStep: expected an optimizer": lambda: ndp.ParamStep(optimizer=0.1),
    "EM: expected e_step of type EStep": lambda: ndp.EM(model, optax.sgd(1.0), e_step=4),
    "positive semi-definite .* the eigenvalue -1": lambda: ndp.GaussianDenoiser(
        jnp.zeros(2), jnp.asarray([[1.0, 2.0], [2.0, 1.0]])
    ),
    "expected a symmetric covariance": lambda: ndp.GaussianDenoiser(
        jnp.zeros(2), jnp.asarray([[1.0, 0.5], [0.0, 1.0]])
    ),
    "has negative variances": lambda: ndp.GaussianDenoiser(
        jnp.zeros(2), ndp.linalg.Diagonal(jnp.asarray([1.0, -1.0]))
    ),
    "each of 1 channels, got 6 eigenvalues": lambda: ndp.GaussianDenoiser(
        jnp.zeros(6), stationary(jnp.ones(6))
    ),
    "power >= 0 of a stationary covariance, got -1": lambda: ndp.GaussianDenoiser(
        jnp.zeros(4), stationary(jnp.asarray([1.0, -1.0, 1.0, -1.0]))
    ),
    "opposite frequencies, since fields are real, .* differ by 0.5": lambda: ndp.GaussianDenoiser(
        jnp.zeros(5),
        ndp.linalg.Blocks(
            (stationary(jnp.asarray([1.0, 1.0, 1.0, 1.5])), ndp.linalg.Isotropic(1.0, 1))
        ),
    ),
    "weights that are not negative and sum to one": lambda: ndp.MixtureDenoiser(
        [-0.5, 1.5], jnp.zeros((2, 2)), jnp.eye(2)
    ),
    "and sum to one, got": lambda: ndp.MixtureDenoiser([1.0, 1.0], jnp.zeros((2, 2)), jnp.eye(2)),
    "sample_posterior: expected num_samples >= 1, got 0": lambda: ndp.sample_posterior(
        KEY, model, GAUSSIAN, Y, num_samples=0
    ),
    "sample_posterior: expected max_batch_size >= 1, got 0": lambda: ndp.sample_posterior(
        KEY, model, GAUSSIAN, Y, max_batch_size=0
    ),
    "EM.run: expected patience >= 1, got 0": lambda: make_em(optax.sgd(1.0)).run(
        KEY, 1, make_prior(), Y, heldout=(Y,), patience=0
    ),
    "num_iterations as second argument, got DiffusionPrior": lambda: make_em(optax.sgd(1.0)).run(
        KEY, make_prior(), 5, Y
    ),
    "EM.run: expected num_iterations to be an integer, got 2.5": lambda: make_em(
        optax.sgd(1.0)
    ).run(KEY, 2.5, make_prior(), Y),
    "EM.run: expected patience to be an integer, got True": lambda: make_em(optax.sgd(1.0)).run(
        KEY, 1, make_prior(), Y, heldout=(Y,), patience=True
    ),
    "train: expected num_steps to be an integer, got 2.5": lambda: train(num_steps=2.5),
    "train: expected ema_decay >= 0 and <= 1, got nan": lambda: train(ema_decay=float("nan")),
    "num_projections to be an integer, got 8.0": lambda: ndp.metrics.sliced_wasserstein(
        KEY, Y, Y, num_projections=8.0
    ),
    "expected p >= 1, got nan": lambda: ndp.metrics.sliced_wasserstein(KEY, Y, Y, p=float("nan")),
    "embedding to be an integer, got 4.0": lambda: ndp.MLP((2,), embedding=4.0, rngs=nnx.Rngs(0)),
    "thinning >= 1, got 0": lambda: ndp.calibrate(KEY, model, GAUSSIAN, Y, thinning=0),
    "rngs=0": lambda: ndp.MLP((2,), rngs=0),
}


@pytest.mark.parametrize("message", NUMBERS)
def test_what_cannot_be_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        NUMBERS[message]()


def test_numbers_of_numpy_are_welcome():
    assert S.DDPM(np.int64(8), sigma_min=np.float32(0.5)) == S.DDPM(8, sigma_min=0.5)
    assert hash(E(num_particles=np.int32(2))) == hash(E(num_particles=2))
    assert S.DDPM(sigma_max=jnp.asarray(2.0)).sigma_max == 2.0
    assert train(num_steps=np.int32(2), batch_size=np.int64(4))[1].shape == (2,)
    two = ndp.metrics.sliced_wasserstein(KEY, Y, 0 * Y, num_projections=np.int64(8), p=np.int32(2))
    assert two == ndp.metrics.sliced_wasserstein(KEY, Y, 0 * Y, num_projections=8)
    run = make_em(optax.sgd(1e-3)).run
    result = run(
        KEY, np.int64(1), make_prior(), Y, heldout=(Y,), patience=np.int32(1), progress_bar=False
    )
    assert result.state.num_iterations == 1


def rising(num_steps, sigma_min, sigma_max):
    return jnp.linspace(sigma_min, sigma_max, num_steps)


class Rising(ndp.noise.Schedule):
    def __call__(self, num_steps, sigma_min, sigma_max):
        return jnp.linspace(sigma_min, sigma_max, num_steps)


@pytest.mark.parametrize("function", [ndp.sample_posterior, ndp.log_evidence])
def test_levels_that_rise_are_refused(function):
    with pytest.raises(ValueError, match="noise levels that are positive and decrease"):
        function(KEY, model, GAUSSIAN, Y, sampler=S.DDPM(4, schedule=Rising()))


@pytest.mark.parametrize("kind", [ndp.guidance.Tempered, ndp.guidance.Piecewise])
def test_schedules_of_particles_that_look_ahead_are_refused(kind):
    guidance = kind(ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True))
    match = f"{kind.__name__}: expected guidance that does not look ahead"
    with pytest.raises(ValueError, match=match):
        ndp.sample_posterior(KEY, model, GAUSSIAN, Y, num_particles=2, guidance=guidance)


def test_a_file_with_weights_that_are_no_numbers_is_refused(tmp_path):
    denoiser = jax.tree.map(lambda leaf: leaf * jnp.nan, make_prior().denoiser)
    save_denoiser(tmp_path / "nan.safetensors", denoiser)
    with pytest.raises(ValueError, match="holds NaN or infinities"):
        load_denoiser(tmp_path / "nan.safetensors")
