r"""`DiffusionReparam`: a diffusion site as a function of standard normal noise.

A deterministic sampler is a map :math:`x = S(z)` from noise :math:`z \sim \mathcal{N}(0, I)` to
the draws of the prior. With :math:`z` in place of :math:`x` as the model's latent, NumPyro's
inference (NUTS, SVI, SteinVI, ...) runs on the model unchanged, with gradients through the
sampler. It is exact for the distribution of the sampler's draws, which approaches that of the
probability flow with more steps.

One evaluation of the model's density costs as many evaluations of the denoiser as the sampler has
steps, and its gradient three times as much; memory holds one step, and ``x_t`` at every step.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam

from numpyro_diffprior.diffusion.probability_flow import flow_noise
from numpyro_diffprior.diffusion.samplers import MultistepODE
from numpyro_diffprior.prior import DiffusionPrior

__all__ = ["DiffusionReparam"]


class DiffusionReparam(Reparam):
    """Reparametrize a site with a `DiffusionPrior` by the noise of `MultistepODE`.

    The noise is the site ``{name}_base``; the site itself becomes deterministic. `invert` turns
    posterior draws into initial values of the noise.

    Args:
        num_steps: The number of steps of the sampler.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> import numpyro_diffprior as ndp
        >>> def model(prior, y):
        ...     x = numpyro.sample("x", prior)
        ...     numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(2), jnp.eye(2)))
        >>> exact = numpyro.handlers.reparam(model, config={"x": ndp.DiffusionReparam()})
        >>> mcmc = MCMC(NUTS(exact), num_warmup=200, num_samples=200, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), prior, jnp.ones(2))
        >>> mcmc.get_samples()["x"].shape
        (200, 2)
    """

    def __init__(self, num_steps: int = 32) -> None:
        self.sampler = MultistepODE(num_steps)

    def __call__(
        self, name: str, fn: dist.Distribution, obs: jax.Array | None
    ) -> tuple[None, jax.Array]:
        """Sample the noise; return None (no distribution) and the sampler's draw.

        Raises:
            ValueError: If the site is observed, or has another distribution.
        """
        if obs is not None:
            raise ValueError(
                f"DiffusionReparam: site '{name}' is observed; reparametrize latent sites only."
            )
        prior, batch_shape, event_dim = self._unwrap(fn)
        if not isinstance(prior, DiffusionPrior):
            raise ValueError(
                f"DiffusionReparam: expected a DiffusionPrior at site '{name}', got "
                f"{type(prior).__name__}; name the sites with diffusion priors in `config`."
            )
        normal = dist.Normal(jnp.zeros(prior.event_shape, prior.denoiser.dtype), 1)
        noise = self._wrap(normal.to_event(prior.event_dim), batch_shape, event_dim)
        z = numpyro.sample(f"{name}_base", noise)
        x_t = self.sampler.start(prior.denoiser, z)
        # The sampler is deterministic, so that the key is not used.
        x = self.sampler.run(jax.random.key(0), prior.denoiser, x_t)
        return None, prior.denoiser.to_data(x)

    def invert(self, prior: DiffusionPrior, x: jax.Array) -> jax.Array:
        """Return the noise of given events: initial values of ``{name}_base``.

        It inverts the probability flow, which the sampler follows up to its own error.

        Args:
            prior: The prior.
            x: Events, with shape ``(*batch, *event)``: draws of `sample_posterior`, say.

        Returns:
            Noise with the shape of ``x``; NaN where the flow could not be solved.
        """
        return flow_noise(prior.denoiser, prior.denoiser.from_data(x))
