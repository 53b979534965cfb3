r"""Plots of runs of EM, of samples and of posterior draws, with matplotlib (the extra ``plot``).

As in ArviZ, functions take the axes to draw on, or make a figure of their own, and return the
axes. They follow matplotlib's current style.
"""

from numpyro_diffprior.plot.curves import coverage, ess_path, history
from numpyro_diffprior.plot.events import samples
from numpyro_diffprior.plot.restoration import restored

__all__ = ["coverage", "ess_path", "history", "restored", "samples"]
