"""Eight CPU devices, strict warnings, strict rank promotion, one tiny model."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes are checked from the annotations of the modules that are nothing but functions.
install_import_hook(
    ["rlhf_jax.masked", "rlhf_jax.advantages", "rlhf_jax.conditioning", "rlhf_jax.objectives"],
    "beartype.beartype",
)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
