"""The smoke experiment with rows enough for 512 devices."""

from pathlib import Path

from rlhf_jax.experiment import load

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke.py"


def config():
    return load(str(SMOKE), ["data.prompts.batch=1024", "data.pairs.batch=512"])
