r"""The state, metrics and result of expectation maximization."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.training import TrainState
from numpyro_diffprior.em.sites import Priors, Sites

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Best", "EMMetrics", "EMResult", "EMState", "Progress"]


class EMState(NamedTuple):
    """The state of `EM`, a pytree.

    Dicts of priors have the keys of the dict that was passed; a prior that was passed alone has
    the key ``"prior"``.

    Attributes:
        priors: The current priors, from which the next E-step draws.
        training: The training states of the priors with a network.
        initial: Their untrained denoisers, where M-steps start if ``warm_start`` is False.
        params: The values of the model's ``numpyro.param`` sites, by name.
        params_opt_state: The state of their optimizer.
        draws: The last draws by site, with shape ``(num_draws, *batch, *event)``; NaN for events
            that have not been drawn yet.
        rng_key: The random key of the next iteration.
        num_iterations: The number of completed iterations.
        sites: Which prior governs which site.
    """

    priors: Priors
    training: dict[str, TrainState]
    initial: dict[str, NetworkDenoiser]
    params: dict[str, jax.Array]
    params_opt_state: optax.OptState
    draws: dict[str, jax.Array]
    rng_key: jax.Array
    num_iterations: int
    sites: Sites

    @property
    def prior(self) -> Any:
        """The current prior, or priors, as passed."""
        return self.sites.as_passed(self.priors)


class EMMetrics(NamedTuple):
    """Metrics: scalars for an iteration, arrays of shape ``(num_iterations,)`` for a run.

    Attributes:
        loss: The mean training loss of the M-step, over the priors.
        sliced_wasserstein: The sliced Wasserstein distance between this E-step's draws and the
            previous ones, the mean over the sites; beyond 32,768 draws, of a regular subset.
        residual: The mean relative residual of guidance's solves.
        num_truncated: The mean number of directions that guidance left out.
        num_solver_steps: The mean number of steps of conjugate gradients per draw.
        ess: The mean over the draws of the smallest effective sample size along the path.
        num_resamplings: The mean number of resamplings per draw.
        log_evidence: The mean log-evidence per event (NaN with one particle).
        reduced_chi_square: The mean squared residual of the draws in units of the noise.
        e_step_seconds: The wall-clock time of the E-step.
        m_step_seconds: The wall-clock time of the M-step.
        heldout_log_evidence: The log-evidence of all held-out events (NaN without any).
        heldout_standard_error: Its standard error.
        num_failed: The number of draws that were not finite, summed over the sites. Means over
            draws ignore NaN.
        diverged: Whether an M-step met a loss, gradient or weight that is not finite; it then
            keeps the weights of before.
    """

    loss: jax.Array
    sliced_wasserstein: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    num_solver_steps: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    reduced_chi_square: jax.Array
    e_step_seconds: jax.Array
    m_step_seconds: jax.Array
    heldout_log_evidence: jax.Array
    heldout_standard_error: jax.Array
    num_failed: jax.Array
    diverged: jax.Array

    def to_dataset(self, first_iteration: int = 1) -> "xr.Dataset":
        """Return the metrics of a run as an ``xarray.Dataset``.

        It has the coordinate ``iteration``, and one variable per metric with the attributes
        ``long_name`` and ``units``: nats (``nat``), seconds (``s``) or ``1``. The sliced
        Wasserstein distance has no ``units``, since it has the unit of the data.

        Args:
            first_iteration: The number of the first iteration; for a run from ``init_state``,
                ``init_state.num_iterations + 1``.
        """
        import xarray as xr  # slow to import

        dims = ("iteration",) if np.ndim(self.loss) else ()
        variables = {}
        for name, values in self._asdict().items():
            # Other libraries do not know bfloat16.
            dtype = float if jnp.issubdtype(jnp.result_type(values), jnp.floating) else None
            variables[name] = (dims, np.asarray(values, dtype), _ATTRIBUTES[name])
        numbers = np.arange(first_iteration, first_iteration + np.size(self.loss))
        return xr.Dataset(variables, {"iteration": numbers} if dims else None)


def _attributes(long_name: str, units: str | None = "1") -> dict[str, str]:
    return {"long_name": long_name} | ({} if units is None else {"units": units})


_ATTRIBUTES = {
    "loss": _attributes("training loss"),
    "sliced_wasserstein": _attributes("sliced Wasserstein distance to previous draws", None),
    "residual": _attributes("relative residual of guidance's solves"),
    "num_truncated": _attributes("number of directions left out by guidance"),
    "num_solver_steps": _attributes("number of steps of conjugate gradients per draw"),
    "ess": _attributes("smallest effective sample size along the path"),
    "num_resamplings": _attributes("number of resamplings per draw"),
    "log_evidence": _attributes("log-evidence per event", "nat"),
    "reduced_chi_square": _attributes("reduced chi-square of the draws"),
    "e_step_seconds": _attributes("time of the E-step", "s"),
    "m_step_seconds": _attributes("time of the M-step", "s"),
    "heldout_log_evidence": _attributes("held-out log-evidence", "nat"),
    "heldout_standard_error": _attributes("standard error of the held-out log-evidence", "nat"),
    "num_failed": _attributes("number of draws that were not finite"),
    "diverged": _attributes("whether the training diverged", None),
}


class EMResult(NamedTuple):
    """The result of `EM.run`.

    Attributes:
        prior: The learned prior, of the last iteration.
        state: The last state, from which `EM.run` can continue.
        history: The iterations' metrics.
        best: The prior with the largest held-out log-evidence, of an iteration or of the state
            from which the run continued; without held-out events, that of the last iteration.
        params: The values of the model's ``numpyro.param`` sites after the last iteration; put
            them into the model with ``numpyro.handlers.substitute``.
        best_params: Those of the iteration of ``best``.
    """

    prior: Any
    state: EMState
    history: EMMetrics
    best: Any
    params: dict[str, jax.Array]
    best_params: dict[str, jax.Array]


class Best(NamedTuple):
    """What the held-out log-evidence selects.

    Attributes:
        priors: The priors of the best iteration so far.
        params: The values of the model's ``numpyro.param`` sites then.
        log_evidence: Their held-out log-evidence.
        num_waited: The number of iterations since.
    """

    priors: Priors
    params: dict[str, jax.Array]
    log_evidence: float
    num_waited: int

    @classmethod
    def of(cls, state: EMState, log_evidence: float = -math.inf) -> "Best":
        """Return a state as the best one so far."""
        return cls(state.priors, state.params, log_evidence, 0)

    def after(self, state: EMState, log_evidence: float | None) -> "Best":
        """Return the best after an iteration: the iteration itself without held-out events."""
        if log_evidence is None:
            return Best.of(state)
        if log_evidence > self.log_evidence:
            return Best.of(state, log_evidence)
        return self._replace(num_waited=self.num_waited + 1)


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        state: The current state.
        best: The best priors so far.
        history: The metrics of each iteration.
    """

    state: EMState
    best: Best
    history: list[EMMetrics]

    @property
    def columns(self) -> EMMetrics:
        """The metrics as arrays, with shape ``(num_iterations,)``."""
        columns = (
            zip(*self.history, strict=True) if self.history else [[]] * len(EMMetrics._fields)
        )
        return EMMetrics(*(jnp.stack(c) if c else jnp.zeros(0) for c in columns))

    def to_dataset(self) -> "xr.Dataset":
        """Return the metrics of the iterations as a dataset, with the iterations' numbers."""
        num_before = self.state.num_iterations - len(self.history)
        return self.columns.to_dataset(num_before + 1)

    @property
    def has_diverged(self) -> bool:
        """Whether the training of the last iteration diverged."""
        return bool(self.history) and bool(self.history[-1].diverged)

    def is_over(self, num_iterations: int, patience: int | None) -> bool:
        """Whether a run of at most this number of iterations ends here."""
        is_worse = patience is not None and self.best.num_waited >= patience
        return len(self.history) >= num_iterations or self.has_diverged or is_worse

    def result(self) -> EMResult:
        """Return the result of the iterations so far."""
        state, best, _ = self
        return EMResult(
            prior=state.prior,
            state=state,
            history=self.columns,
            best=state.sites.as_passed(best.priors),
            params=state.params,
            best_params=best.params,
        )
