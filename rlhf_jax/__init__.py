"""rlhf_jax: RLHF as pure functions, compiled by XLA and sharded over meshes."""

__version__ = "0.1.0"
