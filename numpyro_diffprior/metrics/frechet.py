r"""The Fréchet distance between the features of two sets of samples.

References:
    Heusel et al., *GANs trained by a two time-scale update rule*, arXiv 1706.08500.
"""

import jax
import jax.numpy as jnp

__all__ = ["check_squares", "frechet_distance"]


def frechet_distance(features_x: jax.Array, features_y: jax.Array) -> jax.Array:
    r"""Fréchet distance between Gaussians fitted to two sets of features (squared, as FID is).

    .. math::
        \lVert \mu_x - \mu_y \rVert^2 + \mathrm{tr}\left(\Sigma_x + \Sigma_y
        - 2 (\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2})^{1/2}\right)

    The trace of the square root is the sum of the singular values of :math:`R_x R_y^\top`, where
    :math:`\Sigma = R^\top R` from a QR decomposition of the centered features. For nearly singular
    covariances, these are more precise than square roots of eigenvalues of the symmetric product.

    Args:
        features_x: Features with shape ``(n, k)``, ``n >= 2``.
        features_y: Features with shape ``(m, k)``, ``m >= 2``.

    Returns:
        The squared distance, scalar.

    Raises:
        ValueError: If the features are not matrices of one width with two rows or more.
    """
    features_x, features_y = jnp.asarray(features_x), jnp.asarray(features_y)
    shapes = features_x.shape, features_y.shape
    if any(len(s) != 2 or s[0] < 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            "frechet_distance: expected features with shapes (n, k) and (m, k), n and m at least "
            f"2, got {shapes[0]} and {shapes[1]}."
        )
    check_squares("frechet_distance", features_x, features_y)
    mean_x, root_x = _mean_and_root(features_x)
    mean_y, root_y = _mean_and_root(features_y)
    product = jnp.matmul(root_x, root_y.T, precision="highest")
    overlap = jnp.sum(jnp.linalg.svd(product, compute_uv=False))
    traces = jnp.sum(root_x**2) + jnp.sum(root_y**2)
    return jnp.sum((mean_x - mean_y) ** 2) + traces - 2 * overlap


def check_squares(name: str, x: jax.Array, y: jax.Array) -> None:
    """Raise a `ValueError` if squares overflow or underflow; not checked under ``jit``."""
    size = jnp.maximum(jnp.abs(x).max(), jnp.abs(y).max())
    limits = jnp.finfo(jnp.result_type(float, x, y))
    if isinstance(size, jax.core.Tracer) or not jnp.isfinite(size):
        return
    if not (size == 0 or limits.tiny**0.5 < 1e-3 * float(size) < 1e-6 * limits.max**0.5):
        raise ValueError(
            f"{name}: squares of values near {float(size):.3g} overflow or underflow in "
            f"{limits.dtype}; divide both clouds by their unit."
        )


def _mean_and_root(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean, and a root R of the covariance R^T R."""
    mean = jnp.mean(features, axis=0)
    root = jnp.linalg.qr(features - mean, mode="r")
    return mean, root / (features.shape[0] - 1) ** 0.5
