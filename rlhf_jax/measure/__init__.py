"""Measures of what a model says: diversity, drift, calibration, worlds, probes, patches.

Functions of arrays that return numbers, in numpy and float64 but where a model is asked. In nats.
"""

from rlhf_jax.measure.diversity import collision as collision
from rlhf_jax.measure.diversity import distinct as distinct
from rlhf_jax.measure.diversity import distinct_by_sample as distinct_by_sample
from rlhf_jax.measure.diversity import diversity_across_inputs as diversity_across_inputs
from rlhf_jax.measure.diversity import diversity_per_input as diversity_per_input
from rlhf_jax.measure.diversity import effective_number as effective_number
from rlhf_jax.measure.diversity import (
    expectation_adjusted_distinct as expectation_adjusted_distinct,
)
from rlhf_jax.measure.diversity import hill_two as hill_two
from rlhf_jax.measure.diversity import miller_madow as miller_madow
from rlhf_jax.measure.diversity import mode_mass as mode_mass
from rlhf_jax.measure.diversity import modes_holding as modes_holding
from rlhf_jax.measure.diversity import ngram_entropy as ngram_entropy
from rlhf_jax.measure.diversity import plug_in_entropy as plug_in_entropy
from rlhf_jax.measure.diversity import self_bleu as self_bleu
from rlhf_jax.measure.diversity import text_counts as text_counts
from rlhf_jax.measure.estimate import Estimate as Estimate
from rlhf_jax.measure.patching import Restored as Restored
from rlhf_jax.measure.patching import next_logp as next_logp
from rlhf_jax.measure.patching import patched as patched
from rlhf_jax.measure.patching import restored as restored
from rlhf_jax.measure.probing import Readout as Readout
from rlhf_jax.measure.probing import Selectivity as Selectivity
from rlhf_jax.measure.probing import activations as activations
from rlhf_jax.measure.probing import direction as direction
from rlhf_jax.measure.probing import probe as probe
from rlhf_jax.measure.probing import selectivity as selectivity
from rlhf_jax.measure.probing import unstacked as unstacked
