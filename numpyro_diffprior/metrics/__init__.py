r"""Metrics of samples: distances between point clouds, calibration and scores of draws."""

from numpyro_diffprior.metrics.frechet import frechet_distance
from numpyro_diffprior.metrics.ranks import coverage, sbc_ranks, sbc_uniformity_pvalue
from numpyro_diffprior.metrics.scores import crps
from numpyro_diffprior.metrics.transport import (
    TransportResult,
    entropic_transport,
    entropic_transport_cost,
    excess_transport_cost,
    max_sliced_wasserstein,
    sinkhorn_divergence,
    sliced_wasserstein,
)

__all__ = [
    "TransportResult",
    "coverage",
    "crps",
    "entropic_transport",
    "entropic_transport_cost",
    "excess_transport_cost",
    "frechet_distance",
    "max_sliced_wasserstein",
    "sbc_ranks",
    "sbc_uniformity_pvalue",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]
