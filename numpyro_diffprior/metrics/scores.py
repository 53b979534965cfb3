r"""Scores of posterior draws against the truth that generated the data.

References:
    Gneiting and Raftery, *Strictly proper scoring rules, prediction, and estimation*, 2007.
"""

import jax
import jax.numpy as jnp

__all__ = ["crps"]


def crps(samples: jax.Array, truth: jax.Array) -> jax.Array:
    r"""Continuous ranked probability score of each element, an unbiased estimate.

    .. math:: E |X - x| - \tfrac{1}{2} E |X - X'|

    with independent draws :math:`X` and :math:`X'`. It is least, on average, for draws from the
    distribution of the truth :math:`x`, and has the unit of the data.

    Args:
        samples: Posterior draws with shape ``(draws, *shape)``, at least two.
        truth: The true values, with shape ``shape``.

    Returns:
        The scores, with shape ``shape``; less is better.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two draws.
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim == 0 or samples.shape[1:] != truth.shape or len(samples) < 2:
        raise ValueError(
            "crps: expected samples with shape (draws, *shape), two draws or more, and truth with "
            f"shape shape, got {samples.shape} and {truth.shape}."
        )
    num = len(samples)
    weights = jnp.reshape(2 * jnp.arange(num) - num + 1, (num,) + (1,) * truth.ndim)
    spread = jnp.sum(weights * jnp.sort(samples, axis=0), axis=0) / (num * (num - 1))
    return jnp.mean(jnp.abs(samples - truth), axis=0) - spread
