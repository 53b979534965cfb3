r"""Proposals of Metropolis-Hastings in a vector space, fitted while a chain warms up.

Half of the proposals are steps of a random walk,

.. math:: x' = x + \frac{2.38}{\sqrt d} \, s \, L n, \quad n \sim \mathcal{N}(0, I),

and half are drawn from Student's t distribution with location :math:`m`, scale :math:`L L^T` and
five degrees of freedom, wherever the chain is. Steps move on from any state, and independent
proposals forget it. During warm-up, :math:`m` and :math:`L L^T` become the mean and the covariance
of windows of the chain, and :math:`s` is adapted to the rate at which steps are accepted. All
moments are relative to the last :math:`m` and :math:`L`, so that units do not matter.

References:
    | Haario, Saksman and Tamminen, *An adaptive Metropolis algorithm*, Bernoulli 7, 2001.
    | Garthwaite, Fan and Sisson, *Adaptive optimal scaling of Metropolis-Hastings algorithms using
      the Robbins-Monro process*, Communications in Statistics 45, 2016, arXiv 1006.3690.
    | Sherlock, Thiery, Roberts and Rosenthal, *On the efficiency of pseudo-marginal random walk
      Metropolis algorithms*, Annals of Statistics 43, 2015, arXiv 1309.7209 (rates of acceptance).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_diffprior.linalg.batched import einsum

__all__ = ["FittedProposal", "Independent", "Proposed", "adapt", "propose"]

DEGREES_OF_FREEDOM = 5
# Between 0.07, for estimates with a variance of about three, and 0.23, for exact densities.
TARGET = 0.15


class Independent(NamedTuple):
    """A distribution of proposals that do not depend on the state.

    Attributes:
        sample: A function from a random key to a vector.
        log_prob: A function from a vector to its log-density, up to a constant.
    """

    sample: Callable[[jax.Array], jax.Array]
    log_prob: Callable[[jax.Array], jax.Array]


class FittedProposal(NamedTuple):
    """Proposals for vectors of ``d`` elements, and the moments of the current window.

    Attributes:
        mean: The location of independent proposals, with shape ``(d,)``.
        root: A lower triangular root of the covariance, with shape ``(d, d)``.
        log_scale: The logarithm of the scale of steps.
        num_steps: The number of steps that were proposed in this window.
        num_accepted: The number of proposals that were accepted in this window.
        num_states: The number of states of this window.
        center: Their mean, relative to ``mean`` and ``root``, with shape ``(d,)``.
        scatter: The sum of squares about it, with shape ``(d, d)``.
    """

    mean: jax.Array
    root: jax.Array
    log_scale: jax.Array
    num_steps: jax.Array
    num_accepted: jax.Array
    num_states: jax.Array
    center: jax.Array
    scatter: jax.Array

    @classmethod
    def start(cls, mean: jax.Array, root: jax.Array) -> "FittedProposal":
        """Return proposals with a mean and a root of the covariance, and an empty window."""
        zero, none = jnp.zeros((), mean.dtype), jnp.zeros((), int)
        zeros = jnp.zeros_like(mean), jnp.zeros_like(root)
        return cls(mean, root, zero, none, none, none, *zeros)

    @property
    def independent(self) -> Independent:
        """Student's t distribution of the independent proposals."""
        size = len(self.mean)

        def sample(rng_key: jax.Array) -> jax.Array:
            key_normal, key_gamma = jax.random.split(rng_key)
            half = DEGREES_OF_FREEDOM / 2
            gamma = jax.random.gamma(key_gamma, half, dtype=self.mean.dtype) / half
            normal = jax.random.normal(key_normal, (size,), self.mean.dtype)
            return self.mean + self._scale(normal / jnp.sqrt(gamma))

        def log_prob(x: jax.Array) -> jax.Array:
            square = jnp.sum(self._whiten(x) ** 2)
            return -(DEGREES_OF_FREEDOM + size) / 2 * jnp.log1p(square / DEGREES_OF_FREEDOM)

        return Independent(sample, log_prob)

    def step(self, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        """Return a step of the random walk."""
        scale = 2.38 / jnp.sqrt(len(x)) * jnp.exp(self.log_scale)
        return x + scale * self._scale(jax.random.normal(rng_key, x.shape, x.dtype))

    def _scale(self, v: jax.Array) -> jax.Array:
        return einsum("ij,j->i", self.root, v)

    def _whiten(self, x: jax.Array) -> jax.Array:
        return solve_triangular(self.root, x - self.mean, lower=True)


class Proposed(NamedTuple):
    """A proposal.

    Attributes:
        x: The proposed vector.
        log_ratio: The log-density of proposing the way back, minus that of the way here.
        is_step: Whether it is a step of the random walk.
    """

    x: jax.Array
    log_ratio: jax.Array
    is_step: jax.Array


def propose(
    rng_key: jax.Array,
    proposal: FittedProposal,
    x: jax.Array,
    independent: Independent | None = None,
) -> Proposed:
    """Propose a step or, as often, an independent vector.

    Args:
        rng_key: A random key.
        proposal: The proposals.
        x: The state of the chain, with shape ``(d,)``.
        independent: The distribution of independent proposals (default: the fitted one).
    """
    independent = proposal.independent if independent is None else independent
    key_kind, key_x = jax.random.split(rng_key)
    is_step = jax.random.bernoulli(key_kind)
    new = jnp.where(is_step, proposal.step(key_x, x), independent.sample(key_x))
    log_ratio = independent.log_prob(x) - independent.log_prob(new)
    return Proposed(new, jnp.where(is_step, 0, log_ratio), is_step)


def adapt(
    proposal: FittedProposal,
    x: jax.Array,
    accept_prob: jax.Array,
    *,
    is_step: jax.Array,
    moved: jax.Array,
    is_last: jax.Array,
) -> FittedProposal:
    """Adapt the scale of steps and, after the last state of a window, mean and covariance.

    Args:
        proposal: The proposals.
        x: The new state of the chain, with shape ``(d,)``.
        accept_prob: The probability with which the last proposal was accepted.
        is_step: Whether it was a step.
        moved: Whether it was accepted.
        is_last: Whether a window ends.
    """
    num_steps = proposal.num_steps + is_step
    # The constant is that of Garthwaite, Fan and Sisson for a rate of 0.15 in several dimensions.
    gain = 3 * jnp.maximum(num_steps, 1) ** -0.75
    change = jnp.where(is_step, gain * (accept_prob - TARGET), 0)
    num = proposal.num_states + 1
    difference = proposal._whiten(x) - proposal.center
    center = proposal.center + difference / num
    outer = einsum("i,j->ij", difference, difference) * (num - 1) / num
    grown = proposal._replace(
        log_scale=proposal.log_scale + change,
        num_steps=num_steps,
        num_accepted=proposal.num_accepted + moved,
        num_states=num,
        center=center,
        scatter=proposal.scatter + outer,
    )
    refitted, is_last = _refit(grown), is_last & (grown.num_accepted > 0)
    return jax.tree.map(lambda new, old: jnp.where(is_last, new, old), refitted, grown)


def _refit(proposal: FittedProposal) -> FittedProposal:
    """Take mean and covariance of the window, of which the old ones are a part.

    The old mean counts as one state, and the old covariance, of the size of the new one, as many
    as there are elements; a window as many as its chain moved.
    """
    size, num = len(proposal.mean), proposal.num_accepted
    cov = proposal.scatter / proposal.num_states
    old = jnp.trace(cov) / size * jnp.eye(size, dtype=cov.dtype)
    root = jnp.linalg.cholesky((num * cov + size * old) / (num + size))
    mean = proposal.mean + num / (num + 1) * proposal._scale(proposal.center)
    return FittedProposal.start(mean, einsum("ij,jk->ik", proposal.root, root))
