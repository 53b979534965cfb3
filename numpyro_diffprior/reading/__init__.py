"""Reading a NumPyro model: its latent sites and their likelihood."""
