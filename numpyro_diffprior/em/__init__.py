"""Empirical Bayes: priors learned from observations by expectation maximization."""
