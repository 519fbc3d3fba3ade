"""Objectives: one file, one pure function `(scores, batch, *, hyperparameters) -> Terms`."""

from rlhf_jax.objectives.combine import combine as combine
from rlhf_jax.objectives.cringe import cringe as cringe
from rlhf_jax.objectives.cringe import cringe_vocab as cringe_vocab
from rlhf_jax.objectives.horizon_one import from_head as from_head
from rlhf_jax.objectives.horizon_one import horizon_one as horizon_one
from rlhf_jax.objectives.horizon_one import horizon_one_vocab as horizon_one_vocab
from rlhf_jax.objectives.horizon_one import marked_token as marked_token
from rlhf_jax.objectives.mle import mle as mle
from rlhf_jax.objectives.ppo import ppo as ppo
from rlhf_jax.objectives.reference_kl import reference_kl as reference_kl
from rlhf_jax.objectives.reference_kl import reference_kl_vocab as reference_kl_vocab
from rlhf_jax.objectives.reinforce import reinforce as reinforce
from rlhf_jax.objectives.reward_model import reward_model as reward_model
from rlhf_jax.objectives.sampled_kl import sampled_kl as sampled_kl
from rlhf_jax.objectives.segment_reward_model import segment_reward_model as segment_reward_model
from rlhf_jax.objectives.signed_likelihood import signed_likelihood as signed_likelihood
from rlhf_jax.objectives.token_npo import token_npo as token_npo
from rlhf_jax.objectives.token_reward_model import token_reward_model as token_reward_model
from rlhf_jax.objectives.unlikelihood import unlikelihood as unlikelihood
from rlhf_jax.objectives.value import value as value
