"""A laboratory for exact answers, where a policy is small enough to write down all it can say.

Enumerate the texts, ask a model for their probabilities, measure them, compare with where the
method must end, and take the expected gradient of an objective over every batch it could draw:

    outputs = exact.enumerate_outputs(prompt=[0], vocab=5, length=3, stop=[1])
    start = exact.probabilities(reference_params, outputs, model=model)
    found = exact.probabilities(trained_params, outputs, model=model)
    exact.kl(found, exact.tilted(start, reward, beta=0.5))
    exact.kl_by_position(found, start, outputs)

A distribution `p` is `[n]`, one probability a text; a reward is `[n]`, or `[n, t]` by token. All of
it is numpy in float64, and in nats, but where a model or a gradient is asked for.
"""

from rlhf_jax.exact.gradients import expected_gradient as expected_gradient
from rlhf_jax.exact.gradients import experience as experience
from rlhf_jax.exact.gradients import gradient_flow as gradient_flow
from rlhf_jax.exact.gradients import gradient_of as gradient_of
from rlhf_jax.exact.measures import advantages as advantages
from rlhf_jax.exact.measures import conditionals as conditionals
from rlhf_jax.exact.measures import distribution as distribution
from rlhf_jax.exact.measures import entropy as entropy
from rlhf_jax.exact.measures import kl as kl
from rlhf_jax.exact.measures import kl_between_and_within as kl_between_and_within
from rlhf_jax.exact.measures import kl_by_position as kl_by_position
from rlhf_jax.exact.measures import levels as levels
from rlhf_jax.exact.measures import state_values as state_values
from rlhf_jax.exact.measures import token_rewards as token_rewards
from rlhf_jax.exact.optima import best_of_n as best_of_n
from rlhf_jax.exact.optima import best_of_n_bound as best_of_n_bound
from rlhf_jax.exact.optima import conditioned as conditioned
from rlhf_jax.exact.optima import horizon_optimum as horizon_optimum
from rlhf_jax.exact.optima import linear_pool as linear_pool
from rlhf_jax.exact.optima import log_pool as log_pool
from rlhf_jax.exact.optima import log_pool_cost as log_pool_cost
from rlhf_jax.exact.optima import maxent as maxent
from rlhf_jax.exact.optima import maxent_value as maxent_value
from rlhf_jax.exact.optima import mutual_information as mutual_information
from rlhf_jax.exact.optima import posteriors as posteriors
from rlhf_jax.exact.optima import sequence_temperature as sequence_temperature
from rlhf_jax.exact.optima import temperature_of_entropy as temperature_of_entropy
from rlhf_jax.exact.optima import tilted as tilted
from rlhf_jax.exact.optima import tilted_value as tilted_value
from rlhf_jax.exact.optima import token_temperature as token_temperature
from rlhf_jax.exact.outputs import Outputs as Outputs
from rlhf_jax.exact.outputs import enumerate_outputs as enumerate_outputs
from rlhf_jax.exact.outputs import probabilities as probabilities
from rlhf_jax.exact.outputs import token_logp as token_logp
