"""Guidance that depends on the noise level: piecewise, or with a tempered twist.

A cheap approximation may suffice at high noise levels, where the noisy prior is nearly Gaussian,
but not at low ones, where its modes are separate.
"""

from dataclasses import dataclass, field

import jax

from numpyro_diffprior._compile.checks import check_number, set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.mmps import MMPS

__all__ = ["Piecewise", "Tempered"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Piecewise(Guidance):
    """One guidance at high noise levels, another at low ones.

    By default, the Gaussian covariance at high noise levels, which needs a single vector-Jacobian
    product, and Tweedie's at low ones, where the modes of the prior are separate.

    Args:
        high: The guidance above the threshold.
        low: The guidance below it.
        threshold: The noise level between the two, in units of the prior's scale.

    Raises:
        ValueError: If one of the guidances looks ahead (`MMPS`), which cannot be piecewise.
    """

    high: Guidance = field(default=MMPS(GaussianCovariance()))
    low: Guidance = field(default=MMPS())
    threshold: float = 1.0

    def __post_init__(self) -> None:
        for part in (self.high, self.low):
            if not isinstance(part, Guidance):
                raise ValueError(f"Piecewise: expected an instance of Guidance, got {part!r}.")
        set_fields(self, threshold=check_number("Piecewise", "threshold", self.threshold))

    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        high, low = (
            _condition(self, part, denoiser, likelihood) for part in (self.high, self.low)
        )
        return _PiecewisePosterior(denoiser, likelihood, high, low, self.threshold)


@dataclass(frozen=True, eq=False)
class _PiecewisePosterior(GuidedDenoiser):
    """The denoisers of a posterior at high and at low noise levels."""

    high: GuidedDenoiser
    low: GuidedDenoiser
    threshold: float

    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
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
            sigma > self.threshold * self.prior.scale,
            lambda: self.high.guide(x_t, sigma, guess),
            lambda: self.low.guide(x_t, sigma, guess),
        )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tempered(Guidance):
    r"""Guidance whose twist is tempered at high noise levels.

    .. math:: \psi_t^{\gamma}, \quad \gamma = 1 - (1 - p) \frac{\sigma^2}{\sigma^2 + s^2}

    with the prior's scale :math:`s`. Particles are guided as before, but at high noise levels,
    where the Gaussian approximation of the twist is poor, resampling depends on it less. The limit
    of many particles is exact with any positive twist.

    Args:
        guidance: The guidance.
        power: The power :math:`p` of the twist at high noise levels; one changes nothing.

    Raises:
        ValueError: If the guidance looks ahead (`MMPS`), since its proposals have their own twist.
    """

    guidance: Guidance = field(default=MMPS())
    power: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            raise ValueError(f"Tempered: expected an instance of Guidance, got {self.guidance!r}.")
        power = check_number("Tempered", "power", self.power, 0, 1, inclusive=True)
        set_fields(self, power=power)

    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        posterior = _condition(self, self.guidance, denoiser, likelihood)
        return _TemperedPosterior(denoiser, likelihood, posterior, self.power)


@dataclass(frozen=True, eq=False)
class _TemperedPosterior(GuidedDenoiser):
    """The denoiser of a posterior with a tempered twist."""

    posterior: GuidedDenoiser
    power: float

    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
        guided = self.posterior.guide(x_t, sigma, guess)
        share = sigma**2 / (sigma**2 + self.prior.scale**2)
        power = 1 - (1 - self.power) * share
        return guided._replace(log_twist=power * guided.log_twist)


def _condition(
    owner: Guidance, guidance: Guidance, denoiser: Denoiser, likelihood: Likelihood
) -> GuidedDenoiser:
    """Return the denoiser of the posterior; raise a `ValueError` if its particles look ahead."""
    posterior = guidance.condition(denoiser, likelihood)
    if posterior.looks_ahead:
        raise ValueError(
            f"{type(owner).__name__}: expected guidance that does not look ahead, got "
            f"{guidance!r}; particles that look ahead are not guided. Set look_ahead=False."
        )
    return posterior
