"""Objectives: one file, one pure function `(scores, batch, *, hyperparameters) -> Terms`."""

from rlhf_jax.objectives.combine import combine as combine
from rlhf_jax.objectives.mle import mle as mle
from rlhf_jax.objectives.ppo import ppo as ppo
from rlhf_jax.objectives.reference_kl import reference_kl as reference_kl
from rlhf_jax.objectives.reference_kl import reference_kl_vocab as reference_kl_vocab
from rlhf_jax.objectives.reinforce import reinforce as reinforce
from rlhf_jax.objectives.reward_model import reward_model as reward_model
from rlhf_jax.objectives.sampled_kl import sampled_kl as sampled_kl
from rlhf_jax.objectives.unlikelihood import unlikelihood as unlikelihood
from rlhf_jax.objectives.value import value as value
