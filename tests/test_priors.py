"""One prior, or a dict of them."""

import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from flax import nnx

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.em.sites import (
    Sites,
    all_of,
    map_over,
    map_priors,
    map_trained,
    one_of,
    pool,
    read_sites,
)
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.latent import read_latent
from numpyro_diffprior.reading.tracing import bind

FIXED = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), jnp.eye(2)))
LEARNED = DiffusionPrior(NetworkDenoiser(MLP((2,), features=(4,), rngs=nnx.Rngs(0))))
PRIORS = {"a": FIXED, "b": LEARNED}


def two_of_one(priors):
    with numpyro.plate("n", 3):
        numpyro.sample("first", priors["b"])
        numpyro.sample("second", priors["a"])
        numpyro.sample("third", priors["b"])


def test_sites_of_priors():
    latent = read_latent(bind(two_of_one, (PRIORS,), {}))
    sites = read_sites(PRIORS, latent)
    assert dict(sites.keys) == {"first": "b", "second": "a", "third": "b"}
    values = {name: jnp.full((5, 3, 2), i) for i, name in enumerate(("first", "second", "third"))}
    pooled = pool(values, sites, "b", (2,))
    np.testing.assert_array_equal(pooled, np.repeat([0, 2], 15)[:, None] * np.ones(2))
    others = {"a": FIXED, "b": DiffusionPrior(GaussianDenoiser(jnp.ones(2), jnp.eye(2)))}
    with pytest.raises(ValueError, match=r"site 'first' has a prior that is not among .*'a', 'b'"):
        read_sites(others, latent)


def test_every_learned_prior_has_sites():
    latent = read_latent(bind(two_of_one, (PRIORS,), {}))
    with pytest.raises(ValueError, match=r"got the same one as \['b', 'c'\]; build"):
        read_sites(PRIORS | {"c": DiffusionPrior(LEARNED.denoiser)}, latent)
    other = DiffusionPrior(NetworkDenoiser(MLP((2,), features=(4,), rngs=nnx.Rngs(1))))
    with pytest.raises(ValueError, match=r"no latent site has the priors \['c'\].*leave them out"):
        read_sites(PRIORS | {"c": other}, latent)
    # Others have nothing to learn.
    sites = read_sites(PRIORS | {"c": FIXED}, latent)
    assert dict(sites.keys) == {"first": "b", "second": "a", "third": "b"}


def test_one_prior_has_no_name():
    def one(prior):
        with numpyro.plate("n", 3):
            numpyro.sample("x", prior)

    assert read_sites(FIXED, read_latent(bind(one, (FIXED,), {}))) == Sites((("x", None),))
    assert all_of(FIXED) == [FIXED]
    assert one_of(FIXED, None) is FIXED
    assert map_over(lambda prior: prior.event_shape, FIXED) == (2,)
    assert map_priors(lambda prior, key: key, FIXED) is None


def test_functions_of_all():
    assert all_of(PRIORS) == [FIXED, LEARNED]
    assert one_of(PRIORS, "b") is LEARNED
    assert map_over(lambda prior: prior.event_shape, PRIORS) == {"a": (2,), "b": (2,)}
    assert map_priors(lambda prior, key: key, PRIORS) == {"a": "a", "b": "b"}
    assert map_trained(lambda prior, key: key, PRIORS) == {"b": "b"}
