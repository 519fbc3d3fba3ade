"""Eight CPU devices, strict warnings, strict rank promotion, one tiny model."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here are tiny: nearly all of the time is LLVM's and MLIR's, which are told to do little.
# XLA's own passes run all the same.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
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

import toys  # noqa: E402  (after the hook and the flags)

from rlhf_jax.models.transformer import Transformer  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="write the golden tables anew")
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model():
    """One tiny model for everyone, with both heads."""
    return Transformer(vocab=32, width=32, layers=2, heads=8, kv_heads=4, mlp=64, value_head=True)


@pytest.fixture(scope="session")
def params(model):
    """Weights with logits of about unit size and a value head that is not zero."""
    return toys.weights(model)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Programs are compiled once for all runs."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
