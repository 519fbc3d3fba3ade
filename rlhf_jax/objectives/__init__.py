"""Objectives: one file, one pure function `(scores, batch, *, hyperparameters) -> Terms`."""

from rlhf_jax.objectives.mle import mle as mle
from rlhf_jax.objectives.ppo import ppo as ppo
from rlhf_jax.objectives.reward_model import reward_model as reward_model
from rlhf_jax.objectives.value import value as value
