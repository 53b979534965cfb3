"""`DiffusionPrior` against NumPyro's own distributions, and as a citizen of NumPyro's models."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax.tree_util import register_dataclass
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.inspect import get_model_relations
from oracles import covariance, spd, tolerance

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.serialization import save_denoiser
from numpyro_diffprior.diffusion.probability_flow import flow_log_prob
from numpyro_diffprior.diffusion.samplers import DDIM, MultistepSDE
from numpyro_diffprior.linalg.covariances import Covariance, Diagonal, Isotropic
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.prior import DiffusionPrior

FEW = MultistepSDE(num_steps=4)


def gaussian(event_shape, name="Dense", seed=0):
    rng = np.random.default_rng(seed)
    size = int(np.prod(event_shape))
    return GaussianDenoiser(jnp.asarray(rng.normal(size=event_shape)), covariance(name, rng, size))


def mixture():
    rng = np.random.default_rng(1)
    covs = jnp.asarray(np.stack([spd(rng, 2, 0.2, 0.5) for _ in range(3)]))
    return MixtureDenoiser(
        jnp.asarray([0.2, 0.3, 0.5]), jnp.asarray(rng.normal(size=(3, 2))), covs
    )


def network():
    net = MLP((2, 2), features=(4,), embedding=4, rngs=nnx.Rngs(2))
    return NetworkDenoiser(net, jnp.ones((2, 2)))


CASES = {
    "scalar": lambda: gaussian((), "Isotropic"),
    "vector": lambda: gaussian((3,)),
    "matrix": lambda: gaussian((2, 2), "DiagonalPlusLowRank"),
    "rank 3": lambda: gaussian((1, 2, 2), "Diagonal"),
    "mixture": mixture,
    "network": network,
}


@pytest.fixture(params=CASES)
def prior(request):
    return DiffusionPrior(CASES[request.param](), sampler=FEW, validate_args=True)


def smoothed(denoiser, sigma=None):
    """The Gaussian at a noise level, by default that where the flow starts."""
    sigma = denoiser.sigma_min if sigma is None else sigma
    cov = denoiser.cov.noisy(sigma**2).dense()
    cov = (cov + cov.T) / 2  # NumPyro checks for symmetry to the last bit or so
    return dist.MultivariateNormal(denoiser.mean.reshape(-1), cov)


def test_shapes_and_support(prior):
    event_shape = prior.denoiser.event_shape
    assert prior.event_shape == event_shape
    assert prior.batch_shape == ()
    assert prior.support.event_dim == prior.event_dim == len(event_shape)
    assert not prior.is_discrete
    assert prior.mean.shape == prior.variance.shape == event_shape
    for sample_shape in ((), (2, 3)):
        x = prior.sample(jax.random.key(0), sample_shape)
        assert x.shape == prior.shape(sample_shape)
        assert x.dtype == prior.denoiser.dtype
        assert prior.support(x).all()
    log_prob = prior.log_prob(jnp.zeros((2, 1, *event_shape)))
    assert log_prob.shape == (2, 1)
    assert jnp.isfinite(log_prob).all()


def test_tree_round_trip(prior):
    leaves, structure = jax.tree.flatten(prior)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(rebuilt) == structure
    assert (rebuilt.sampler, rebuilt.num_probes, rebuilt.max_batch_size) == (FEW, None, None)
    assert rebuilt.event_shape == prior.event_shape
    key = jax.random.key(1)
    np.testing.assert_array_equal(rebuilt.sample(key, (2,)), prior.sample(key, (2,)))
    # JAX rebuilds pytrees around placeholders, which no validation may see.
    jax.tree.unflatten(structure, [object()] * len(leaves))


def test_wrappers():
    prior = DiffusionPrior(gaussian((2, 2)), sampler=FEW)
    x = prior.sample(jax.random.key(2), (4, 3))
    log_prob = prior.log_prob(x)
    expanded = prior.expand((4, 3))
    assert expanded.sample(jax.random.key(3)).shape == (4, 3, *prior.event_shape)
    assert expanded.sample(jax.random.key(3), (2,)).shape == (2, 4, 3, *prior.event_shape)
    assert expanded.mean.shape == (4, 3, *prior.event_shape)
    tol = {"rtol": 10 * tolerance()}
    np.testing.assert_allclose(expanded.log_prob(x), log_prob, **tol)
    np.testing.assert_allclose(expanded.to_event(1).log_prob(x), log_prob.sum(-1), **tol)
    mask = jnp.asarray([True, False, True])
    masked = expanded.mask(mask)
    np.testing.assert_allclose(masked.log_prob(x), jnp.where(mask, log_prob, 0), **tol)


@pytest.mark.parametrize("name", ["Isotropic", "Diagonal", "DiagonalPlusLowRank", "Dense"])
def test_gaussian_moments(name):
    prior = DiffusionPrior(gaussian((2, 2), name), sampler=MultistepSDE(num_steps=64))
    num = 4000
    x = prior.sample(jax.random.key(4), (num,)).reshape(num, -1)
    cov = prior.denoiser.cov.dense()
    np.testing.assert_allclose(prior.variance.reshape(-1), jnp.diag(cov), rtol=tolerance())
    variances = jnp.diag(cov)
    error_mean = (x.mean(0) - prior.mean.reshape(-1)) / jnp.sqrt(variances / num)
    products = variances[:, None] * variances
    error_cov = (jnp.cov(x.T) - cov) / jnp.sqrt((products + cov**2) / num)
    assert jnp.abs(error_mean).max() < 4.5
    assert jnp.abs(error_cov).max() < 4.5


def test_draws_in_chunks():
    prior = DiffusionPrior(gaussian((3,)), sampler=MultistepSDE(num_steps=64), max_batch_size=501)
    num = 2001
    x = prior.sample(jax.random.key(5), (num,))
    np.testing.assert_array_equal(x, prior.sample(jax.random.key(5), (num,)))
    assert len(np.unique(x[:, 0])) == num  # every chunk has a key of its own
    error = (x.mean(0) - prior.mean) / jnp.sqrt(prior.variance / num)
    assert jnp.abs(error).max() < 4.5
    shaped = prior.sample(jax.random.key(5), (3, 667))
    np.testing.assert_array_equal(shaped.reshape(x.shape), x)


def test_log_prob_in_chunks():
    prior = DiffusionPrior(gaussian((2, 2)), max_batch_size=2)
    exact = smoothed(prior.denoiser)
    flat = exact.sample(jax.random.key(6), (5,))
    x = flat.reshape(5, 1, 2, 2)
    log_prob, pullback = jax.vjp(prior.log_prob, x)
    np.testing.assert_allclose(log_prob[:, 0], exact.log_prob(flat), atol=1e-3)
    (gradient,) = pullback(jnp.ones((5, 1)))
    expected = jax.vmap(jax.grad(exact.log_prob))(flat)
    atol = 1e-3 * jnp.abs(expected).max()
    np.testing.assert_allclose(gradient.reshape(5, 4), expected, atol=atol)


def test_no_events():
    # Unvalidated: NumPyro's constraints do not take empty arrays.
    prior = DiffusionPrior(gaussian((2, 2)), validate_args=False)
    assert prior.sample(jax.random.key(0), (3, 0)).shape == (3, 0, 2, 2)
    assert prior.log_prob(jnp.zeros((3, 0, 2, 2))).shape == (3, 0)


def temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_bounded_by_the_batch():
    def used(num, max_batch_size):
        prior = DiffusionPrior(gaussian((16,)), sampler=FEW, max_batch_size=max_batch_size)
        return temporary_bytes(lambda p: p.sample(jax.random.key(0), (num,)).sum(), prior)

    events = 4096 * 16 * jnp.zeros(()).dtype.itemsize
    assert used(4096, 64) < used(4096, 4096) - 2 * events
    assert used(4096, 64) < 2 * events


@pytest.mark.parametrize("case", ["scalar", "matrix"])
def test_log_prob_of_a_gaussian(case):
    prior = DiffusionPrior(CASES[case]())
    exact = smoothed(prior.denoiser)
    flat = exact.sample(jax.random.key(7), (5,))
    x = flat.reshape(5, *prior.event_shape)
    log_prob, pullback = jax.vjp(prior.log_prob, x)
    # The solver works to a relative tolerance of 1e-5 in either precision.
    np.testing.assert_allclose(log_prob, exact.log_prob(flat), atol=1e-3)
    gradient = pullback(jnp.ones(5))[0].reshape(flat.shape)
    expected = jax.vmap(jax.grad(exact.log_prob))(flat)
    np.testing.assert_allclose(gradient, expected, atol=1e-3 * jnp.abs(expected).max())


def test_log_prob_of_one_event():
    prior = DiffusionPrior(gaussian((3,)))
    x = jnp.asarray([0.3, -0.2, 1.0])
    np.testing.assert_allclose(prior.log_prob(x), smoothed(prior.denoiser).log_prob(x), atol=1e-3)


def test_events_that_take_too_long_are_nan():
    x = jnp.zeros((1, 3))
    assert jnp.isnan(flow_log_prob(gaussian((3,)), x, max_steps=2)).all()


def test_log_prob_does_not_depend_on_units():
    denoiser = gaussian((3,))
    x = smoothed(denoiser).sample(jax.random.key(8), (4,))
    expected = DiffusionPrior(denoiser).log_prob(x)
    for unit in (1e-6, 1e6):
        cov = denoiser.cov.scale(unit**2)
        prior = DiffusionPrior(GaussianDenoiser(unit * denoiser.mean, cov))
        found = prior.log_prob(unit * x) + 3 * jnp.log(unit)
        np.testing.assert_allclose(found, expected, atol=tolerance(1e-3, 1e-6))


def smoothed_mixture(denoiser):
    covs = denoiser.covs.noisy(denoiser.sigma_min**2).dense()
    components = dist.MultivariateNormal(denoiser.means, (covs + covs.mT) / 2)
    return dist.MixtureSameFamily(dist.Categorical(denoiser.weights), components)


def test_log_prob_of_a_mixture():
    exact = smoothed_mixture(mixture())
    x = exact.sample(jax.random.key(9), (6,))
    # The flow ends in the Gaussian with the mixture's moments instead of the mixture.
    np.testing.assert_allclose(DiffusionPrior(mixture()).log_prob(x), exact.log_prob(x), atol=5e-3)


@pytest.mark.slow
def test_gradient_of_a_mixture():
    exact = smoothed_mixture(mixture())
    x = exact.sample(jax.random.key(9), (6,))
    gradient = jax.grad(lambda x: DiffusionPrior(mixture()).log_prob(x).sum())(x)
    expected = jax.vmap(jax.grad(exact.log_prob))(x)
    np.testing.assert_allclose(gradient, expected, atol=2e-2 * jnp.abs(expected).max())


def test_hutchinson_is_close_to_exact():
    size, num_probes = 80, 16
    prior = DiffusionPrior(gaussian((size,)))
    exact = smoothed(prior.denoiser)
    x = exact.sample(jax.random.key(10), (2,))
    all_probes = DiffusionPrior(prior.denoiser, num_probes=size).log_prob(x)
    np.testing.assert_allclose(all_probes, exact.log_prob(x), atol=1e-2)
    # The integrated divergence is the trace of a function of the covariance.
    low, high = prior.denoiser.sigma_min**2, prior.denoiser.sigma_max**2
    values, vectors = jnp.linalg.eigh(prior.denoiser.cov.dense())
    matrix = vectors * (0.5 * jnp.log((values + high) / (values + low))) @ vectors.T
    square = jnp.sum(matrix**2) - jnp.sum(jnp.diag(matrix) ** 2)
    error = prior.log_prob(x) - all_probes
    assert jnp.abs(error).max() < 4 * jnp.sqrt(2 * square / num_probes)
    assert jnp.abs(error).min() > 0.01  # it is an estimate
    np.testing.assert_allclose(error[0], error[1], atol=1e-2)  # with the same probes


def test_score_and_denoise():
    denoiser = gaussian((2, 2))
    prior = DiffusionPrior(denoiser)
    x_t = jax.random.normal(jax.random.key(11), (3, 2, 2))
    sigma = jnp.asarray([0.1, 1.0, 10.0])
    for i in range(3):
        score = jax.grad(smoothed(denoiser, sigma[i]).log_prob)(x_t[i].reshape(-1)).reshape(2, 2)
        tol = {"rtol": tolerance(1e-4), "atol": tolerance(1e-3, 1e-9)}
        np.testing.assert_allclose(prior.score(x_t, sigma)[i], score, **tol)
        x_hat = x_t[i] + sigma[i] ** 2 * score
        np.testing.assert_allclose(prior.denoise(x_t, sigma)[i], x_hat, **tol)
    np.testing.assert_allclose(prior.score(x_t, 1)[1], prior.score(x_t, sigma)[1], rtol=1e-5)


def test_the_priors_type_is_kept():
    mean = jnp.zeros(2, jnp.float32)
    prior = DiffusionPrior(GaussianDenoiser(mean, jnp.eye(2)), sampler=FEW)
    x = prior.sample(jax.random.key(12), (2,))
    assert x.dtype == jnp.float32
    assert prior.log_prob(np.asarray(x, np.float64)).dtype == jnp.float32
    assert prior.score(x, 1.0).dtype == prior.denoise(x, 1.0).dtype == jnp.float32


@register_dataclass
@dataclass(frozen=True, eq=False)
class Counting(Denoiser):
    """A Gaussian denoiser that counts how often it is traced."""

    mean: jax.Array
    cov: Covariance
    traces = []

    def __call__(self, x_t, sigma):
        self.traces.append(1)
        return GaussianDenoiser(self.mean, self.cov)(x_t, sigma)


def test_new_weights_never_recompile():
    first = Counting(jnp.zeros(2), Isotropic(jnp.asarray(1.0), 2))
    second = Counting(jnp.ones(2), Isotropic(jnp.asarray(2.0), 2))
    traces = []

    @jax.jit
    def outer(prior, key):
        traces.append(1)
        x = prior.sample(key, (3,))
        return x, prior.log_prob(x)

    for denoiser in (first, second):
        if denoiser is second:
            num = len(Counting.traces)
        prior = DiffusionPrior(denoiser, sampler=FEW)
        x, log_prob = outer(prior, jax.random.key(13))
        # Eager calls are compiled once as well.
        np.testing.assert_allclose(prior.sample(jax.random.key(13), (3,)), x, rtol=1e-5)
        np.testing.assert_allclose(prior.log_prob(x), log_prob, rtol=1e-3)
    assert len(traces) == 1
    assert len(Counting.traces) == num


def test_vmap_over_priors():
    first, second = gaussian((3,)), gaussian((3,), seed=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    x = jax.random.normal(jax.random.key(14), (2, 3))
    one = DiffusionPrior(first)
    priors = jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(stacked))
    log_probs = jax.vmap(lambda prior, x: prior.log_prob(x))(priors, x)
    moments = jax.vmap(lambda prior: (prior.mean, prior.variance))(priors)
    for i, denoiser in enumerate((first, second)):
        prior = DiffusionPrior(denoiser)
        np.testing.assert_allclose(log_probs[i], prior.log_prob(x[i]), atol=1e-3)
        np.testing.assert_allclose(moments[1][i], prior.variance, rtol=tolerance())
    keys = jax.random.split(jax.random.key(15), 2)
    draws = jax.vmap(one.sample)(keys)
    np.testing.assert_allclose(draws[1], one.sample(keys[1]), rtol=1e-3, atol=1e-4)
    # A prior built inside a transformation comes out of it with a batch of weights.
    built = jax.vmap(lambda mean: DiffusionPrior(replace(first, mean=mean)))(x)
    np.testing.assert_array_equal(built.mean, x)


def test_draws_are_differentiable_in_the_weights():
    def first_moment(mean):
        prior = DiffusionPrior(GaussianDenoiser(mean, jnp.eye(2)), sampler=FEW)
        return prior.rsample(jax.random.key(16), (3,)).sum(0)[0]

    gradient = jax.grad(first_moment)(jnp.zeros(2))
    np.testing.assert_allclose(gradient, [3.0, 0.0], atol=1e-4)


def model(prior, num=3, y=None):
    with numpyro.plate("events", num):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.1).to_event(prior.event_dim), obs=y)


@pytest.mark.parametrize("case", ["scalar", "matrix"])
def test_in_a_model(case):
    prior = DiffusionPrior(CASES[case](), sampler=FEW)
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        model(prior)
    x = trace["x"]["value"]
    assert x.shape == (3, *prior.event_shape)
    assert len(np.unique(x)) == x.size
    with handlers.seed(rng_seed=0), handlers.trace() as again:
        model(prior)
    np.testing.assert_array_equal(again["x"]["value"], x)
    with (
        handlers.condition(data={"x": x + 1}),
        handlers.seed(rng_seed=1),
        handlers.trace() as conditioned,
    ):
        model(prior)
    assert conditioned["x"]["is_observed"]
    log_density, _ = numpyro.infer.util.log_density(model, (prior,), {"y": x}, {"x": x})
    expected = prior.log_prob(x).sum() + dist.Normal(0, 0.1).log_prob(0.0) * x.size
    np.testing.assert_allclose(log_density, expected, rtol=1e-4)


def test_predictive():
    prior = DiffusionPrior(gaussian((2, 2)), sampler=MultistepSDE(num_steps=32))
    draws = Predictive(model, num_samples=5)(jax.random.key(17), prior)
    assert draws["x"].shape == draws["y"].shape == (5, 3, 2, 2)
    assert jnp.abs(draws["x"] - draws["y"]).max() < 0.5
    posterior = {"x": draws["x"]}
    replicated = Predictive(model, posterior)(jax.random.key(18), prior)
    assert set(replicated) == {"y"}
    parallel = Predictive(model, num_samples=5, parallel=True)(jax.random.key(17), prior)
    np.testing.assert_allclose(parallel["x"], draws["x"], rtol=1e-3, atol=1e-4)


def test_relations():
    prior = DiffusionPrior(gaussian((2,)), sampler=FEW)
    relations = get_model_relations(model, (prior,))
    assert relations["sample_dist"]["x"] == "DiffusionPrior"
    assert relations["sample_sample"]["y"] == ["x"]


def test_render_model():
    pytest.importorskip("graphviz")
    graph = numpyro.render_model(model, (DiffusionPrior(gaussian((2,)), sampler=FEW),))
    assert "x -> y" in graph.source


@pytest.mark.parametrize("case", ["vector", "network"])
def test_save_and_load(tmp_path, case):
    prior = DiffusionPrior(CASES[case](), sampler=FEW)
    path = tmp_path / "prior.safetensors"
    prior.save(path)
    loaded = DiffusionPrior.load(path, sampler=FEW, num_probes=4, max_batch_size=8)
    assert (loaded.sampler, loaded.num_probes, loaded.max_batch_size) == (FEW, 4, 8)
    assert DiffusionPrior.load(path).sampler == MultistepSDE()
    key = jax.random.key(19)
    np.testing.assert_array_equal(loaded.sample(key, (2,)), prior.sample(key, (2,)))


def test_load_takes_own_networks(tmp_path):
    class Own(MLP):
        pass

    path = tmp_path / "prior.safetensors"
    save_denoiser(path, NetworkDenoiser(Own((2,), features=(4,), embedding=4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="got 'Own'; pass its class"):
        DiffusionPrior.load(path)
    assert type(DiffusionPrior.load(path, networks={"Own": Own}).denoiser.net) is Own


@pytest.mark.parametrize("validate_args", [None, True, False])
@pytest.mark.parametrize(
    ("event_shape", "shape"),
    [
        ((3,), ()),
        ((3,), (5,)),
        ((3,), (3, 2)),
        ((2, 2), (2,)),
        ((2, 2), (2, 3)),
        ((2, 2), (2, 2, 1)),
    ],
)
def test_wrong_shapes_are_refused(event_shape, shape, validate_args):
    prior = DiffusionPrior(gaussian(event_shape, "Diagonal"), validate_args=validate_args)
    x = jnp.zeros(shape)
    message = r"expected events of shape \({}.*, got an array of shape .*; reshape it"
    match = message.format(event_shape[0])
    for function in (prior.log_prob, jax.jit(prior.log_prob)):
        with pytest.raises(ValueError, match=match):
            function(x)
    for function in (prior.score, prior.denoise):
        with pytest.raises(ValueError, match=match):
            function(x, 1.0)


def test_values_that_are_not_finite():
    denoiser = gaussian((3,))
    x = jnp.zeros((2, 3)).at[0, 1].set(jnp.nan)
    log_prob = DiffusionPrior(denoiser, validate_args=False).log_prob(x)
    assert jnp.isnan(log_prob[0])
    assert jnp.isfinite(log_prob[1])
    with pytest.warns(UserWarning, match="Out-of-support"):
        log_prob = DiffusionPrior(denoiser, validate_args=True).log_prob(x)
    assert log_prob[0] == -jnp.inf
    assert jnp.isfinite(log_prob[1])


@register_dataclass
@dataclass(frozen=True, eq=False)
class Faulty(Denoiser):
    mean: jax.Array
    cov: Covariance

    def __call__(self, x_t, sigma):
        return x_t


UNIT = Isotropic(jnp.asarray(1.0), 2)


@dataclass(frozen=True)
class Unhashable(DDIM):
    """A sampler that cannot be static."""

    rates: list = field(default_factory=list)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((jnp.zeros(2), {}), "expected a Denoiser, got .*wrap a network as NetworkDenoiser"),
        (
            (Faulty(jnp.zeros(2, int), UNIT), {}),
            "expected a denoiser of type float32 or float64, got int",
        ),
        ((Faulty(jnp.zeros(3), UNIT), {}), r"shape \(3,\) need a covariance of size 3, got .* 2"),
        ((Faulty(jnp.full(2, jnp.nan), UNIT), {}), "expected a finite mean, got NaN"),
        ((Faulty(jnp.zeros(2), Diagonal(jnp.zeros(2))), {}), "positive and finite total variance"),
        ((Faulty(jnp.zeros(2), UNIT.scale(jnp.inf)), {}), "positive and finite total variance"),
        (
            (Faulty(jnp.zeros(2), UNIT), {"sampler": MultistepSDE}),
            "expected an instance of Sampler",
        ),
        ((Faulty(jnp.zeros(2), UNIT), {"sampler": Unhashable(rates=[1.0])}), "hashable"),
        ((Faulty(jnp.zeros(2), UNIT), {"num_probes": 0}), "expected num_probes >= 1, got 0"),
        ((Faulty(jnp.zeros(2), UNIT), {"num_probes": 2.5}), "num_probes to be an integer"),
        ((Faulty(jnp.zeros(2), UNIT), {"max_batch_size": -1}), "expected max_batch_size >= 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match):
    denoiser, options = arguments
    with pytest.raises(ValueError, match=match):
        DiffusionPrior(denoiser, **options)


def test_support_of_a_scalar_is_plain():
    assert DiffusionPrior(gaussian((), "Isotropic")).support is constraints.real


@pytest.mark.slow
def test_nuts_has_the_posterior_of_a_gaussian():
    """What a prior with a score but no density gets wrong: mean 2.05 and variance 0.75."""
    size = 20
    prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(size), Isotropic(jnp.asarray(1.0), size)))

    def gaussian_model(prior, y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = MCMC(NUTS(gaussian_model), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(20), prior, jnp.full(size, 2.0), extra_fields=("diverging",))
    assert not mcmc.get_extra_fields()["diverging"].any()
    x = np.asarray(mcmc.get_samples()["x"], np.float64)
    num_effective = effective_sample_size(x[None])
    error = (x.mean(0) - 1.0) / np.sqrt(0.5 / num_effective)
    assert np.abs(error).max() < 4.5
    squares = (x - 1.0) ** 2
    num_effective = effective_sample_size(squares[None])
    error = (squares.mean(0) - 0.5) / np.sqrt(2 * 0.5**2 / num_effective)
    assert np.abs(error).max() < 4.5
    # All elements together: twenty times the evidence.
    assert abs(x.mean() - 1.0) < 4.5 * np.sqrt(0.5 / size / effective_sample_size(x[None]).min())
