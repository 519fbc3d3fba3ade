"""An experiment of seconds: the likelihood of eight sentences, and no rollouts."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rlhf_jax import objectives
from rlhf_jax.config import Checkpointing, Config, Learner
from rlhf_jax.data import streams
from rlhf_jax.experiment import load

TEXTS = [f"{what} is {said}" for what in ("the film", "it") for said in ("good", "bad", "so", "as")]


def config(steps=100_000, **learner) -> Config:
    """The policy of experiments/smoke.py alone; `learner` changes its fields."""
    smoke = load(Path(__file__).parent.parent / "experiments" / "smoke.py")
    text = partial(streams.text, batch=8, length=24, tokenizer="bytes", source=TEXTS, marks=None)
    policy = Learner(smoke.learners["policy"].model, objectives.mle, batch="text")
    return Config(
        name="sft",
        steps=steps,
        mesh=(1, 1, 1, 1),
        data={"text": text},
        learners={"policy": replace(policy, **learner)},
        checkpoint=Checkpointing(every=10),
    )
