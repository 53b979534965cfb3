import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import transforms

from numpyro_diffprior._compile import devices
from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.latent import Plate
from numpyro_diffprior.reading.moments import Moments, gaussian_moments
from numpyro_diffprior.reading.reader import read as read_model
from numpyro_diffprior.reading.tracing import fix_plates
from tests.oracles import tolerance

N, D = 5, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
Y = RNG.normal(size=(N, D))
MATRIX = RNG.normal(size=(2, D))
COV = np.array([[0.5, 0.2], [0.2, 0.4]])


def make_prior(event_shape=(D,)):
    size = int(np.prod(event_shape))
    return DiffusionPrior(GaussianDenoiser(jnp.zeros(event_shape), Isotropic(jnp.ones(()), size)))


def read(model, *args, **kwargs):
    return read_group(model, *args, **kwargs)[1]


def read_group(model, *args, **kwargs):
    """The only group of a model and its likelihood, with whole plates."""
    bound = read_model(model, args, kwargs)
    check_data(bound, bound.reading.sampler)
    (group,) = bound.reading.groups
    return group.latents, group.bind(bound.data).likelihood


def evaluate(model, function, x, event_shape=(D,)):
    """A function of the model's likelihood and values, compiled as one program."""
    bound = read_model(model, (make_prior(event_shape),), {})
    check_data(bound, bound.reading.sampler)
    (group,) = bound.reading.groups
    compiled = jax.jit(lambda data, x: function(group.bind(data).likelihood, x))
    return compiled(bound.data, jnp.asarray(x))


def normal(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=Y)


def expanded(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x.sum(-1), 0.5).expand([N]), obs=Y[:, 0])


def pixels_in_plates(prior):
    with numpyro.plate("n", N, dim=-2):
        x = numpyro.sample("x", prior)[:, 0]
        with numpyro.plate("pixels", D, dim=-1):
            numpyro.sample("y", dist.Normal(x, 0.5), obs=Y)


def multivariate(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        fn = dist.MultivariateNormal(x @ MATRIX.T, covariance_matrix=COV)
        numpyro.sample("y", fn, obs=Y[:, :2])


def low_rank(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        fn = dist.LowRankMultivariateNormal(x @ MATRIX.T, jnp.ones((2, 1)), jnp.full(2, 0.3))
        numpyro.sample("y", fn, obs=Y[:, :2])


def repeated_multivariate(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        mean = jnp.stack([x @ MATRIX.T, x[:, :2]], axis=1)
        fn = dist.MultivariateNormal(mean, covariance_matrix=COV).to_event(1)
        numpyro.sample("y", fn, obs=np.stack([Y[:, :2], Y[:, 1:]], axis=1))


def masked(prior):
    mask = Y > 0
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        fn = dist.Normal(x, 0.5).mask(mask).to_event(1).mask(jnp.arange(N) != 2)
        numpyro.sample("y", fn, obs=np.where(mask, Y, np.nan))


def scaled(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        with handlers.scale(scale=3.0):
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=Y)


def two_sites(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.deterministic("total", x.sum(-1))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=Y)
        fn = dist.MultivariateNormal(x @ MATRIX.T, covariance_matrix=COV)
        numpyro.sample("z", fn, obs=Y[:, :2])
        numpyro.sample("unrelated", dist.Cauchy(0.0, 1.0), obs=Y[:, 0])


UNIT = 0.5  # in which values with this scale are read


def nonlinear(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(jnp.sin(x), 0.5 + x**2).to_event(1), obs=Y)


LINEAR = [
    normal,
    expanded,
    pixels_in_plates,
    multivariate,
    low_rank,
    repeated_multivariate,
    masked,
    scaled,
    two_sites,
]


def exact_log_prob(model, x):
    """The log-likelihood by NumPyro itself, of each event alone."""
    trace = handlers.trace(handlers.substitute(handlers.seed(model, 0), data={"x": x})).get_trace(
        make_prior()
    )
    total = jnp.zeros(N)
    for name in ("y", "z"):
        if name in trace:
            site = trace[name]
            log_prob = site["fn"].log_prob(site["value"]) * (site["scale"] or 1.0)
            total = total + log_prob.reshape(N, -1).sum(-1)
    return total


def value_of(model):
    return X[:, None] if model is pixels_in_plates else X


@pytest.mark.parametrize("model", [*LINEAR, nonlinear], ids=lambda model: model.__name__)
def test_log_prob_is_numpyros(model):
    x = jnp.asarray(value_of(model))
    expected = jax.jit(lambda x: exact_log_prob(model, x))(x)

    def log_probs(likelihood, x):
        stacked = likelihood.log_prob(jnp.stack([x, 2 * x])[None])
        assert stacked.shape == (1, 2, *likelihood.batch_shape)
        return likelihood.log_prob(x), stacked

    log_prob, stacked = evaluate(model, log_probs, x)
    np.testing.assert_allclose(log_prob.reshape(N), expected, rtol=tolerance())
    np.testing.assert_allclose(stacked[0, 0].reshape(N), expected, rtol=tolerance())


@pytest.mark.parametrize("model", LINEAR, ids=lambda model: model.__name__)
def test_moments_of_a_linear_gaussian_model_give_its_density(model):
    """The Gaussian that guidance sees has the gradient and curvature of the exact density."""

    def derivatives(likelihood, x):
        assert likelihood.linear

        def quadratic(x):
            local = likelihood.linearize(x)
            return -0.5 * jnp.sum(local.residual * local.noise.solve(local.residual))

        def exact(x):
            return jnp.sum(likelihood.log_prob(x))

        return [(jax.grad(f)(x), jax.hessian(f)(x)) for f in (quadratic, exact)]

    found, expected = evaluate(model, derivatives, value_of(model))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance(1e-4), atol=tolerance())


def beta(x):
    return dist.Beta(jnp.exp(x), 2.0).mask(Y > 0).to_event(1)


def expanded_dirichlet(x):
    concentration = jnp.exp(x)[..., None, :]
    return dist.Dirichlet(concentration).expand([*x.shape[:-1], 4]).mask(RNG_MASK).to_event(1)


RNG_MASK = np.random.default_rng(1).uniform(size=(N, 4)) < 0.7
PARTS = np.random.default_rng(2).dirichlet(np.ones(D), size=(N, 4))


@pytest.mark.parametrize(("fn", "y"), [(beta, PARTS[:, 0]), (expanded_dirichlet, PARTS)])
def test_many_densities_of_dirichlets_family_at_once(fn, y):
    """As exact as few, which NumPyro's own are not with jaxlib 0.10.2."""
    likelihood = read(with_site(fn, obs=y), make_prior())
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4000, N, D)))
    found, tol = jax.jit(likelihood.log_prob)(x), tolerance(1e-4)
    for part in (slice(20), slice(-20, None)):
        few = jax.jit(jax.vmap(lambda x: fn(x).log_prob(y)))(x[part])
        np.testing.assert_allclose(found[part], few, rtol=tol, atol=tol)


def test_masked_values_do_not_matter():
    likelihood = read(masked, make_prior())
    operator = likelihood.operator(jnp.zeros((N, D)))
    hidden = ~(Y > 0) | (np.arange(N) == 2)[:, None]
    np.testing.assert_array_equal(operator[hidden], 0)
    np.testing.assert_array_equal(likelihood.y[hidden], 0)
    np.testing.assert_array_equal(likelihood.read(jnp.ones((N, D)))[1].diagonal()[hidden], 1)


def test_scale_divides_the_variance():
    noise = read(scaled, make_prior()).read(jnp.asarray(X))[1]
    np.testing.assert_allclose(noise.diagonal(), UNIT**-2 * 0.25 / 3, rtol=tolerance())


def test_a_mean_or_noise_that_bends_is_not_linear():
    likelihood = read(nonlinear, make_prior())
    assert not likelihood.linear
    x = jnp.asarray(X)
    local = likelihood.linearize(x)
    # The value is observed for the mean, and its squared residual for the noise's logarithm.
    scale = 0.5 + X**2
    residual, moved, variance = (
        v.reshape(N, D, 2)
        for v in (local.residual, local.matvec(jnp.ones((N, D))), local.noise.diagonal())
    )
    unit = 2 ** np.floor(np.log2(scale))
    excess = (((Y - np.sin(X)) / scale) ** 2 - 1) / 2
    assert excess.max() < 4
    expected = (Y - np.sin(X)) / unit
    np.testing.assert_allclose(residual[..., 0], expected, rtol=1e-4, atol=tolerance())
    np.testing.assert_allclose(residual[..., 1], excess, rtol=1e-4, atol=tolerance())
    np.testing.assert_allclose(moved[..., 0], np.cos(X) / unit, rtol=tolerance(1e-4))
    np.testing.assert_allclose(moved[..., 1], 2 * X / scale, rtol=tolerance(1e-4))
    np.testing.assert_allclose(variance[..., 0], (scale / unit) ** 2, rtol=tolerance(1e-4))
    np.testing.assert_allclose(variance[..., 1], 0.5, rtol=tolerance(1e-4))


def test_linearity_is_seen_through_jit_and_where():
    @jax.jit
    def blur(x):
        return jnp.where(jnp.arange(D) > 0, x @ jnp.asarray(MATRIX.T @ MATRIX), 2 * x)

    def model(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(blur(x) + 1, 0.5).to_event(1), obs=Y)

    assert read(model, make_prior()).linear


def subsampled(prior, data, batch_size=None):
    with numpyro.plate("n", N, subsample_size=batch_size):
        y = numpyro.subsample(data, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_plates_run_on_given_elements_and_do_not_scale(batch_size):
    index = jnp.array([3, 0])
    bound = read_model(subsampled, (make_prior(), Y, batch_size), {}, block_size=lambda group: 2)
    (group,) = bound.reading.groups
    assert (group.latents.batch_shape, group.latents.plates) == ((2,), (Plate("n", -1, N),))
    likelihood = group.bind(bound.data, {"n": index}).likelihood
    np.testing.assert_allclose(likelihood.y, Y[index] / UNIT, rtol=tolerance())
    x = jnp.asarray(X[index])
    expected = dist.Normal(x, 0.5).to_event(1).log_prob(Y[index])
    np.testing.assert_allclose(likelihood.log_prob(x), expected, rtol=tolerance())
    np.testing.assert_allclose(likelihood.read(x)[1].diagonal(), 1.0, rtol=tolerance())


def test_fix_plates_is_a_handler():
    with fix_plates(indices={"n": jnp.array([1])}), handlers.seed(rng_seed=0):
        with numpyro.plate("n", 4) as index:
            np.testing.assert_array_equal(index, [1])


def test_nested_plates_and_repeated_observations():
    y = RNG.normal(size=(4, 2, N, D))

    def model(prior):
        with numpyro.plate("n", N, dim=-1), numpyro.plate("m", 2, dim=-2):
            x = numpyro.sample("x", prior)
            with numpyro.plate("repeats", 4, dim=-3):
                numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    likelihood = read(model, make_prior())
    assert likelihood.batch_shape == (2, N)
    assert likelihood.num_observed == 4 * D
    x = jnp.asarray(RNG.normal(size=(2, N, D)))
    expected = dist.Normal(x, 0.5).to_event(1).log_prob(y).sum(0)
    np.testing.assert_allclose(likelihood.log_prob(x), expected, rtol=tolerance(1e-4))
    local = likelihood.linearize(x)
    np.testing.assert_allclose(
        local.residual.reshape(2, N, 4, D), np.moveaxis(y - x, 0, 2) / UNIT, atol=tolerance()
    )


def test_hidden_values_of_obs_mask_are_no_latents():
    def model(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=Y[:, 0], obs_mask=Y[:, 0] > 0)

    likelihood = read(model, make_prior())
    expected = jnp.where(Y[:, 0] > 0, dist.Normal(X.sum(-1), 0.5).log_prob(Y[:, 0]), 0.0)
    np.testing.assert_allclose(likelihood.log_prob(jnp.asarray(X)), expected, rtol=tolerance(1e-4))


def test_users_register_moments():
    class Twice(dist.Normal):
        pass

    @gaussian_moments.register
    def _(fn: Twice) -> Moments:
        return Moments(2 * fn.loc, fn.scale**2)

    mean, variance, *_ = gaussian_moments(Twice(jnp.ones(2), jnp.full(2, 3.0)).to_event(1))
    np.testing.assert_array_equal(mean, 2)
    np.testing.assert_array_equal(variance, 9)


WRAPPERS = {
    "independent": (dist.Independent, 1),
    "expanded": (dist.ExpandedDistribution, (N, D)),
    "masked": (dist.MaskedDistribution, True),
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_plate_that_is_divided_may_index_arrays(dtype):
    """By elements of any integer type, at either precision of JAX."""
    gain = jnp.linspace(1.0, 2.0, N)

    def indexed(prior):
        with numpyro.plate("n", N) as index:
            x = numpyro.sample("x", prior)
            y = numpyro.subsample(jnp.asarray(Y), event_dim=1)
            numpyro.sample("y", dist.Normal(gain[index][:, None] * x, 0.5).to_event(1), obs=y)

    expected = read(indexed, make_prior()).log_prob(jnp.asarray(X))
    bound = read_model(indexed, (make_prior(),), {}, block_size=lambda group: 2)
    (group,) = bound.reading.groups
    index = np.array([1, 4], dtype)
    likelihood = group.bind(bound.data, {"n": index}).likelihood
    found = likelihood.log_prob(jnp.asarray(X)[index])
    np.testing.assert_allclose(found, expected[index], rtol=tolerance())


@pytest.mark.parametrize("by_moments", [True, False])
@pytest.mark.parametrize("outer", ["none", "expanded", "masked"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_users_register_moments_of_wrappers(wrapper, outer, by_moments):
    """They are used inside of other wrappers, and so is the user's log-density."""
    base, option = WRAPPERS[wrapper]

    class Precise(base):
        def log_prob(self, value, intermediates=None):
            return 4 * super().log_prob(value, intermediates)

        def expand(self, batch_shape):  # `Independent` would expand what it wraps
            return dist.Distribution.expand(self, batch_shape)

    @gaussian_moments.register
    def _(fn: Precise) -> Moments | None:
        return Moments(fn.base_dist.loc, fn.base_dist.scale**2 / 4) if by_moments else None

    def model(prior):
        with numpyro.plate("n", N):
            fn = Precise(dist.Normal(numpyro.sample("x", prior), 0.5), option)
            fn = fn.to_event(1 - fn.event_dim)
            inside = {"expanded": dist.ExpandedDistribution(fn, (N,)), "masked": fn.mask(True)}
            numpyro.sample("y", inside.get(outer, fn), obs=Y)

    likelihood = read(model, make_prior())
    variances = likelihood.read(jnp.asarray(X))[1].diagonal()
    np.testing.assert_allclose(variances, 0.25 / 4, rtol=tolerance(1e-4))


def with_site(fn, **kwargs):
    def model(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", fn(x), **{"obs": Y[:, 0], **kwargs})

    return model


def no_prior(prior):
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def transformed_prior(prior):
    numpyro.sample("x", dist.TransformedDistribution(prior, transforms.AffineTransform(1.0, 2.0)))


def two_priors(prior):
    numpyro.sample("x", prior)
    numpyro.sample("z", prior)


def nuisance(prior):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=Y[0])


def not_observed(prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1))


def coupled(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x.sum(0), 1.0).to_event(1), obs=Y[0])


def factor(prior):
    x = numpyro.sample("x", prior)
    numpyro.factor("penalty", -jnp.sum(x**2))


def coupled_in_the_plate(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(jnp.cumsum(x, 0), 1.0).to_event(1), obs=Y)


def prior_of_another_site(prior):
    x = numpyro.sample("x", prior)
    z = numpyro.sample("z", DiffusionPrior(GaussianDenoiser(x, jnp.eye(D))))
    numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=Y[0])


def batch_in_the_event(prior):
    x = numpyro.sample("x", prior.expand([N]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=Y)


def coupled_backward_in_the_plate(prior):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        mean = jnp.cumsum(x[::-1], 0)[::-1]
        numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=Y)


ERRORS = [
    (no_prior, "no latent site with a DiffusionPrior"),
    (transformed_prior, "transform its draw, not the prior"),
    (two_priors, "no observed site depends on the latent site 'x' and 'z'"),
    (nuisance, r"latent sites \['scale'\] have no sampler"),
    (not_observed, r"latent sites \['y'\] have no sampler"),
    (
        coupled_in_the_plate,
        r"in the plates \['n'\] an observed site of \['y'\] depends on other elements of 'x'",
    ),
    (
        coupled_backward_in_the_plate,
        r"in the plates \['n'\] an observed site of \['y'\] depends on other elements of 'x'",
    ),
    (prior_of_another_site, r"priors of the latent sites \['z'\] depend on other sites"),
    (
        batch_in_the_event,
        "latent site 'x': expected events of shape .* replace `.to_event` by a plate",
    ),
    (
        with_site(lambda x: dist.LKJ(2, 3 + x.sum(-1)), obs=np.broadcast_to(np.eye(2), (N, 2, 2))),
        "observed site 'y': observations from LKJ are not read",
    ),
    (
        with_site(lambda x: dist.Delta(x.sum(-1))),
        "observed site 'y': a Delta observation has no noise",
    ),
    (
        with_site(lambda x: dist.Normal(0.0, 1.0)),
        "no observed site depends on the latent site 'x'",
    ),
    (
        with_site(lambda x: dist.Normal(x.sum(-1), 0.0, validate_args=False)),
        r"noise of \['y'\] has no variance",
    ),
    (
        with_site(lambda x: dist.Normal(x.sum(-1), 1.0), obs=np.full(N, np.nan)),
        r"values of \['y'\] hold NaN",
    ),
]


@pytest.mark.filterwarnings("ignore:Out-of-support values")  # NumPyro's word on the NaN
@pytest.mark.parametrize(("model", "message"), ERRORS, ids=range(len(ERRORS)))
def test_what_cannot_be_read_is_refused(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(model, make_prior())


def test_a_site_outside_of_the_plate_joins_it():
    latent, likelihood = read_group(coupled, make_prior())
    assert (latent.batch_shape, latent.plates) == ((), ())
    assert latent.joined_plates == (Plate("n", -1, N),)
    assert likelihood.event_shape == (N, D)
    assert likelihood.linear
    expected = np.tile(np.eye(D), N)
    np.testing.assert_allclose(likelihood.operator(jnp.asarray(X)), expected, atol=tolerance())
    log_prob = dist.Normal(X.sum(0), 1.0).log_prob(Y[0]).sum()
    np.testing.assert_allclose(likelihood.log_prob(jnp.asarray(X)), log_prob, rtol=tolerance())
    # A site that does not depend on the latent couples nothing.

    def unrelated(prior):
        normal(prior)
        numpyro.sample("z", dist.Normal(0.0, 1.0), obs=1.0)

    assert read_group(unrelated, make_prior())[0].plates == (Plate("n", -1, N),)


def test_fixed_transformations_are_undone():
    """A log-normal observation is a normal one of its logarithm, but for the log-density."""

    def logs(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            fn = dist.LogNormal(x, 0.5).mask(Y > 0).to_event(1)
            numpyro.sample("y", fn, obs=jnp.where(Y > 0, jnp.exp(Y), jnp.nan))

    def base(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).mask(Y > 0).to_event(1), obs=Y)

    found, expected = read(logs, make_prior()), read(base, make_prior())
    assert found.linear
    x = jnp.asarray(X)
    for a, b in zip(
        jax.tree.leaves(found.read(x)), jax.tree.leaves(expected.read(x)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=10 * tolerance())
    jacobian = np.where(Y > 0, Y, 0).sum(-1)
    log_prob = expected.log_prob(x) - jacobian
    np.testing.assert_allclose(found.log_prob(x), log_prob, rtol=10 * tolerance())


def test_values_whose_transform_has_the_moments():
    """A Beta observation is one of two logarithms; that of what rounding leaves is finite."""
    shares = np.where(Y > 0, 1 / (1 + np.exp(-Y)), np.nan)
    shares[np.unravel_index(np.nanargmax(shares), shares.shape)] = 1

    def beta(prior):
        with numpyro.plate("n", N):
            fn = dist.BetaProportion(jax.nn.sigmoid(numpyro.sample("x", prior)), 5.0)
            numpyro.sample("y", fn.mask(Y > 0).to_event(1), obs=jnp.asarray(shares))

    likelihood = read(beta, make_prior())
    y = likelihood.y.reshape(N, D, 2)
    inside = (Y > 0) & (shares < 1)
    logs = np.log(np.stack([shares, np.where(inside, 1 - shares, 1)], axis=-1))
    np.testing.assert_allclose(y[inside], logs[inside], rtol=100 * tolerance())
    assert np.all(np.isfinite(y))
    assert np.all(y[~(Y > 0)] == 0)


def test_a_transformation_that_holds_the_latent_goes_by_moments():
    def shifted(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            fn = dist.TransformedDistribution(
                dist.Gamma(2.0, 1.0), transforms.AffineTransform(x.sum(-1), 3.0)
            )
            numpyro.sample("y", fn, obs=Y[:, 0] + 20)

    reading = read(shifted, make_prior()).read(jnp.asarray(X))
    np.testing.assert_allclose(reading.y_hat[:, 0], X.sum(-1) + 6, rtol=tolerance())
    np.testing.assert_allclose(reading.noise.diagonal()[:, 0], 18, rtol=tolerance())


def test_curvature_of_a_gaussian_factor_is_its_precision():
    precision = np.linalg.inv(COV)

    def gaussian_factor(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            residual = Y[:, :2] - x @ MATRIX.T
            log_factor = -0.5 * jnp.einsum("ni,ij,nj->n", residual, precision, residual)
            numpyro.factor("y", log_factor)

    likelihood = read(gaussian_factor, make_prior())
    assert not likelihood.linear
    x = jnp.asarray(X)
    local = likelihood.linearize(x)
    gradient = local.transpose(local.noise.solve(local.residual))
    expected = (Y[:, :2] - X @ MATRIX.T) @ precision @ MATRIX
    np.testing.assert_allclose(gradient, expected, atol=100 * tolerance())
    vectors, values = local.noise.eigenvectors, local.noise.eigenvalues
    curvature = (vectors / values[..., None, :]) @ vectors.mT
    expected = np.broadcast_to(MATRIX.T @ precision @ MATRIX, (N, D, D))
    np.testing.assert_allclose(curvature, expected, atol=1e-3)
    # Of large events no matrix is made: gradient, and products with the curvature.
    local = read(factor, make_prior((65,))).linearize(jnp.ones(65))
    v = jnp.asarray(np.random.default_rng(4).normal(size=65))
    np.testing.assert_allclose(local.score(), -2 * np.ones(65), rtol=1e-5)
    np.testing.assert_allclose(local.precision(v), 2 * v, rtol=1e-5)


def test_several_parameters_and_many_elements_go_by_curvature():
    labels = np.arange(N * 2).reshape(N, 2) % 3

    def classes(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            logits = jnp.stack([x, -x], axis=1)  # two pixels of three classes
            fn = dist.Categorical(logits=logits).mask(labels != 1).to_event(1)
            numpyro.sample("y", fn, obs=labels)

    def gradients(likelihood, x):
        assert likelihood.num_observed == 2 * D
        local = likelihood.linearize(x)
        found = local.transpose(local.noise.solve(local.residual))
        return found, jax.grad(lambda x: likelihood.log_prob(x).sum())(x), local.residual

    gradient, expected, residual = evaluate(classes, gradients, X)
    np.testing.assert_allclose(gradient, expected, atol=100 * tolerance(1e-5, 1e-8))
    assert np.all(residual.reshape(N, 2, D)[labels == 1] == 0)


COUNTS = np.array([0, 1, 1, 2, 3])
SHAPES_AND_SCALES = {
    "Gamma": lambda x: dist.Gamma(jnp.exp(x[:, 0]), 2.0),
    "Gamma, both": lambda x: dist.Gamma(jnp.exp(x[:, 0]), jnp.exp(x[:, 1])),
    "Chi2": lambda x: dist.Chi2(jnp.exp(x[:, 0])),
    "Weibull": lambda x: dist.Weibull(1.5, jnp.exp(x[:, 0])),
    "NegativeBinomial2": lambda x: dist.NegativeBinomial2(2.0, jnp.exp(x[:, 0])),
    "Beta": lambda x: dist.BetaProportion(0.4, jnp.exp(x[:, 0])),
    "Kumaraswamy": lambda x: dist.Kumaraswamy(jnp.exp(x[:, 0]), jnp.exp(x[:, 1])),
    "Dirichlet": lambda x: dist.Dirichlet(jnp.exp(x)),
    "Multinomial": lambda x: dist.Multinomial(4, logits=x, total_count_max=4),
    "DirichletMultinomial": lambda x: dist.DirichletMultinomial(jnp.exp(x), 4, total_count_max=4),
    "BetaBinomial": lambda x: dist.BetaBinomial(jnp.exp(x[:, 0]), jnp.exp(x[:, 1]), 5),
    "BetaNegativeBinomial": lambda x: dist.BetaNegativeBinomial(
        jnp.exp(x[:, 0]), jnp.exp(x[:, 1]), 3.0
    ),
    "HurdlePoisson": lambda x: dist.HurdlePoisson(jax.nn.sigmoid(x[:, 0]), jnp.exp(x[:, 1])),
    "HurdleGamma": lambda x: dist.HurdleGamma(0.5, jnp.exp(x[:, 0]), jnp.exp(x[:, 1])),
    "HurdleLogNormal": lambda x: dist.HurdleLogNormal(0.5, x[:, 0], 0.5),
    "MultivariateStudentT": lambda x: dist.MultivariateStudentT(
        4.0, x[:, :2], jnp.linalg.cholesky(COV)
    ),
    "MultivariateStudentT, scale": lambda x: dist.MultivariateStudentT(
        4.0, jnp.zeros(2), jnp.exp(x[:, 2, None, None]) * jnp.linalg.cholesky(COV)
    ),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(
        x[:, :2], scale_tril=jnp.exp(x[:, 2, None, None]) * jnp.linalg.cholesky(COV)
    ),
    "GaussianRandomWalk": lambda x: dist.GaussianRandomWalk(jnp.exp(x[:, 0]), 3),
}


@pytest.mark.parametrize("name", SHAPES_AND_SCALES)
def test_shapes_and_scales_are_read(name):
    """Also what does not move the mean: guidance has the gradient of the density."""
    family = SHAPES_AND_SCALES[name]
    y = jax.jit(lambda x: family(x).sample(jax.random.key(0)))(jnp.asarray(X))

    def model(prior):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", family(x).mask(COUNTS != 1), obs=y)

    def gradients(likelihood, x):
        local = likelihood.linearize(x)
        found = local.transpose(local.noise.solve(local.residual))
        return found, jax.grad(lambda x: likelihood.log_prob(x).sum())(x)

    gradient, expected = evaluate(model, gradients, X)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, atol=tolerance(1e-4, 1e-8) * scale)


def test_a_vector_whose_covariance_depends_on_a_large_event():
    """By its log-density, whether the mean depends on the event as well or not."""

    def walk(prior):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.GaussianRandomWalk(jnp.exp(x[0]), 3), obs=np.arange(3.0))

    def both(prior):
        x = numpyro.sample("x", prior)
        fn = dist.MultivariateNormal(x[:3], scale_tril=jnp.exp(x[3]) * jnp.eye(3))
        numpyro.sample("y", fn, obs=np.arange(3.0))

    def derivatives(likelihood, x):
        local, hessian = likelihood.linearize(x), jax.hessian(likelihood.log_prob)(x)
        expected = jax.grad(likelihood.log_prob)(x), -hessian @ x
        return (local.score(), local.precision(x)), expected, likelihood.reduced_chi_square(x)

    x = jnp.linspace(-1.0, 1.0, 65)
    for model in (walk, both):
        found, expected, chi_square = evaluate(model, derivatives, x, (65,))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)
        assert np.isnan(chi_square)


def test_hidden_values_of_vectors_may_be_nan():
    hidden = np.where(COUNTS[:, None] == 1, np.nan, Y)

    def model(prior):
        with numpyro.plate("n", N):
            scale_tril = jnp.exp(numpyro.sample("x", prior)[:, :1, None]) * jnp.eye(D)
            fn = dist.MultivariateNormal(jnp.zeros(D), scale_tril=scale_tril)
            numpyro.sample("y", fn.mask(COUNTS != 1), obs=hidden)

    local = read(model, make_prior()).linearize(jnp.asarray(X))
    assert np.all(np.isfinite(local.residual))
    np.testing.assert_allclose(local.transpose(local.residual)[COUNTS == 1], 0, atol=1e-6)


def test_plate_data_that_is_not_subsampled_is_refused():
    def model(prior, y):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="observed site 'y'.*numpyro.subsample"):
        read_model(model, (make_prior(), Y), {}, block_size=lambda group: 2)


@pytest.mark.parametrize("is_replicated", [True, False])
def test_arrays_that_processes_share(monkeypatch, is_replicated):
    """As in one of several processes: a copy in each is taken, parts are collected."""

    def model(prior, y):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), jnp.eye(2)))
    y = jnp.ones((3, 2))
    monkeypatch.setattr(type(y), "is_fully_addressable", False)
    monkeypatch.setattr(type(y), "is_fully_replicated", is_replicated)
    monkeypatch.setattr(devices, "_collect", lambda x: np.full((3, 2), 2.0))
    arrays = read_model(model, (prior, y), {}).data.arrays
    expected = np.full((3, 2), 1.0 if is_replicated else 2.0)
    assert any(np.array_equal(x, expected) for x in arrays)
