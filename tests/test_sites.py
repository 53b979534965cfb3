"""One prior, or a dict of them: which governs which site."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.em.sites import as_dict, pool, read_sites
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.reader import read


def make_network(seed=0, **options):
    return NetworkDenoiser(MLP((2,), features=(4,), rngs=nnx.Rngs(seed), **options))


FIXED = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), jnp.eye(2)))
LEARNED = DiffusionPrior(make_network())
PRIORS = {"a": FIXED, "b": LEARNED}


def two_of_one(priors):
    with numpyro.plate("n", 3):
        total = numpyro.sample("first", priors["b"])
        total = total + numpyro.sample("second", priors["a"])
        total = total + numpyro.sample("third", priors["b"])
        numpyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=jnp.zeros((3, 2)))


def sites_of(priors, model=two_of_one, passed=None):
    reading = read(model, (priors,), {}).reading
    return read_sites(priors if passed is None else passed, reading)


def test_sites_of_priors():
    sites = sites_of(PRIORS)
    assert dict(sites.site_priors) == {"first": "b", "second": "a", "third": "b"}
    assert sites.as_passed(as_dict(PRIORS)) == PRIORS
    values = {name: jnp.full((5, 3, 2), i) for i, name in enumerate(("first", "second", "third"))}
    pooled = pool(values, sites, "b", (2,))
    np.testing.assert_array_equal(pooled, np.repeat([0, 2], 15)[:, None] * np.ones(2))


def test_a_prior_that_was_not_passed_is_refused():
    other = DiffusionPrior(make_network(1))

    def enclosed(priors):
        two_of_one({"a": priors["a"], "b": other})

    with pytest.raises(ValueError, match=r"site 'first' has a prior that is not among.*'a', 'b'"):
        sites_of(PRIORS, enclosed)

    def alone(prior):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", other)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros((3, 2)))

    with pytest.raises(ValueError, match="site 'x' has a prior that is not the one passed"):
        sites_of(LEARNED, alone)


def test_every_learned_prior_has_sites():
    with pytest.raises(ValueError, match=r"got the same one as \['b', 'c'\]; build"):
        sites_of(PRIORS | {"c": DiffusionPrior(LEARNED.denoiser)})
    other = DiffusionPrior(make_network(1))
    with pytest.raises(ValueError, match=r"no latent site has the priors \['c'\].*leave them out"):
        sites_of(PRIORS | {"c": other})
    # Others have nothing to learn.
    sites = sites_of(PRIORS | {"c": FIXED})
    assert dict(sites.site_priors) == {"first": "b", "second": "a", "third": "b"}


def test_one_prior_is_passed_back_as_one():
    def one(prior):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros((3, 2)))

    sites = sites_of(LEARNED, one)
    assert sites.site_priors == (("x", "prior"),)
    assert as_dict(LEARNED) == {"prior": LEARNED}
    assert sites.as_passed(as_dict(LEARNED)) is LEARNED


def test_a_prior_at_its_contexts_is_the_prior():
    prior = DiffusionPrior(make_network(context_shape=(3,)))

    def labeled(prior, label):
        with numpyro.plate("n", 3):
            label = numpyro.subsample(label, event_dim=1)
            x = numpyro.sample("x", prior.condition(label))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros((3, 2)))

    reading = read(labeled, (prior, jnp.eye(3)), {}).reading
    assert read_sites(prior, reading).site_priors == (("x", "prior"),)


def test_what_is_no_prior_is_refused():
    with pytest.raises(ValueError, match="expected a DiffusionPrior, or a dict.* got MLP"):
        as_dict(LEARNED.denoiser.net)
    with pytest.raises(ValueError, match="expected a prior with a NetworkDenoiser.*Gaussian"):
        as_dict({"a": FIXED})
