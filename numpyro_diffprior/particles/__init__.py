"""Particle samplers: the twisted SMC and its conditional form."""
