"""From a NumPyro model to its latent sites and their likelihood."""
