"""Guidance that changes along the path: another one at low noise, or a flatter twist at high.

What is cheap and good while noise hides the prior's shape need not be right once modes have come
apart.
"""

from dataclasses import dataclass, field

import jax

from numpyro_diffprior._compile.checks import check_number, set_numbers
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.mmps import MMPS

__all__ = ["Piecewise", "Tempered"]


@dataclass(frozen=True)
class Piecewise(Guidance):
    """One guidance at high noise levels, another at low ones.

    A Gaussian's covariance is good enough while noise hides what is not Gaussian, and asks for
    one vector-Jacobian product; Tweedie's matters where modes have come apart.

    Args:
        high: The guidance above the threshold.
        low: The guidance below it.
        threshold: The noise level, in units of the prior's scale.
    """

    high: Guidance = field(default=MMPS(GaussianCovariance()))
    low: Guidance = field(default=MMPS())
    threshold: float = 1.0

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            if not isinstance(getattr(self, name), Guidance):
                raise ValueError(f"Piecewise: expected {name} to be a Guidance.")
        set_numbers(self, threshold=check_number("Piecewise", "threshold", self.threshold))

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior, with the operator of either part."""
        high, low = (part.condition(denoiser, likelihood) for part in (self.high, self.low))
        operator = low.operator if high.operator is None else high.operator
        return GuidedDenoiser(denoiser, likelihood, self, operator)

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level.

        Raises:
            ValueError: If ``sigma`` is not one level for all events.
        """
        if sigma.ndim:
            raise ValueError(
                f"Piecewise: expected one noise level, got levels of shape {sigma.shape}; "
                "evaluate them one by one, with `jax.lax.map`."
            )
        return jax.lax.cond(
            sigma > self.threshold * posterior.denoiser.scale,
            lambda: self.high.guide(posterior, x_t, sigma),
            lambda: self.low.guide(posterior, x_t, sigma),
        )


@dataclass(frozen=True)
class Tempered(Guidance):
    r"""A guidance whose twist is flatter where noise is high.

    .. math:: \psi_t^{\gamma}, \quad \gamma = 1 - (1 - p) \frac{\sigma^2}{\sigma^2 + s^2}

    with the prior's scale :math:`s`. Particles are guided as before, but resampled less on what a
    Gaussian approximation says of a posterior that it does not resemble yet. The limit of many
    particles is exact with any twist.

    Args:
        guidance: The guidance.
        power: The power :math:`p` of the twist at high noise levels; one changes nothing.
    """

    guidance: Guidance = field(default=MMPS())
    power: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            raise ValueError(f"Tempered: expected a Guidance, got {self.guidance!r}.")
        power = check_number("Tempered", "power", self.power, 0, 1, inclusive=True)
        set_numbers(self, power=power)

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior, with the operator of the guidance."""
        operator = self.guidance.condition(denoiser, likelihood).operator
        return GuidedDenoiser(denoiser, likelihood, self, operator)

    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        guided = self.guidance.guide(posterior, x_t, sigma)
        share = sigma**2 / (sigma**2 + posterior.denoiser.scale**2)
        power = 1 - (1 - self.power) * share
        return guided._replace(log_twist=power * guided.log_twist)
