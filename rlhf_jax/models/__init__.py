"""The only modules that know Flax."""
