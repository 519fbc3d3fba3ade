"""Measures of what a model says: diversity, drift, calibration, worlds, probes, patches.

Functions of arrays that return numbers, in numpy and float64 but where a model is asked. In nats.
"""

from rlhf_jax.measure.attractor import Attraction as Attraction
from rlhf_jax.measure.attractor import attraction as attraction
from rlhf_jax.measure.attractor import forecast as forecast
from rlhf_jax.measure.attractor import inject as inject
from rlhf_jax.measure.attractor import predicted_attraction as predicted_attraction
from rlhf_jax.measure.attractor import return_lags as return_lags
from rlhf_jax.measure.calibration import Calibration as Calibration
from rlhf_jax.measure.calibration import GTest as GTest
from rlhf_jax.measure.calibration import calibration as calibration
from rlhf_jax.measure.calibration import g_test as g_test
from rlhf_jax.measure.calibration import next_token_probabilities as next_token_probabilities
from rlhf_jax.measure.decomposition import Decomposition as Decomposition
from rlhf_jax.measure.decomposition import tokens_to_confidence as tokens_to_confidence
from rlhf_jax.measure.decomposition import world_decomposition as world_decomposition
from rlhf_jax.measure.divergence import Divergence as Divergence
from rlhf_jax.measure.divergence import Scored as Scored
from rlhf_jax.measure.divergence import by_position as by_position
from rlhf_jax.measure.divergence import k3 as k3
from rlhf_jax.measure.divergence import per_text as per_text
from rlhf_jax.measure.divergence import per_token as per_token
from rlhf_jax.measure.divergence import sampled_divergence as sampled_divergence
from rlhf_jax.measure.divergence import (
    sampled_kl_between_and_within as sampled_kl_between_and_within,
)
from rlhf_jax.measure.divergence import score_samples as score_samples
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
from rlhf_jax.measure.drift import Projection as Projection
from rlhf_jax.measure.drift import contraction as contraction
from rlhf_jax.measure.drift import correlated_drift as correlated_drift
from rlhf_jax.measure.drift import crossover as crossover
from rlhf_jax.measure.drift import drift_by_label as drift_by_label
from rlhf_jax.measure.drift import gradient_share as gradient_share
from rlhf_jax.measure.drift import growth_exponent as growth_exponent
from rlhf_jax.measure.drift import half_life as half_life
from rlhf_jax.measure.drift import measured_crossover as measured_crossover
from rlhf_jax.measure.drift import null_drift as null_drift
from rlhf_jax.measure.drift import projection as projection
from rlhf_jax.measure.drift import residual_gradients as residual_gradients
from rlhf_jax.measure.drift import row_kl as row_kl
from rlhf_jax.measure.drift import signed_shift as signed_shift
from rlhf_jax.measure.drift import update_norms as update_norms
from rlhf_jax.measure.estimate import Estimate as Estimate
from rlhf_jax.measure.instrumentality import Avoided as Avoided
from rlhf_jax.measure.instrumentality import PredictableFuture as PredictableFuture
from rlhf_jax.measure.instrumentality import PunishedFuture as PunishedFuture
from rlhf_jax.measure.instrumentality import abruptness as abruptness
from rlhf_jax.measure.instrumentality import instrumentality_index as instrumentality_index
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
from rlhf_jax.measure.refit import Refit as Refit
from rlhf_jax.measure.refit import Residual as Residual
from rlhf_jax.measure.refit import filter_residual as filter_residual
from rlhf_jax.measure.refit import model_predictions as model_predictions
from rlhf_jax.measure.refit import refit as refit
from rlhf_jax.measure.temperature import TEMPERATURES as TEMPERATURES
from rlhf_jax.measure.temperature import Distortion as Distortion
from rlhf_jax.measure.temperature import frontier as frontier
from rlhf_jax.measure.temperature import heated as heated
from rlhf_jax.measure.temperature import hypervolume as hypervolume
from rlhf_jax.measure.temperature import matching_temperature as matching_temperature
from rlhf_jax.measure.temperature import sampled_at as sampled_at
from rlhf_jax.measure.temperature import sampled_distortion as sampled_distortion
from rlhf_jax.measure.temperature import shape_distortion as shape_distortion
from rlhf_jax.measure.temperature import sweep as sweep
from rlhf_jax.measure.temperature import sweep_outputs as sweep_outputs
from rlhf_jax.measure.temperature import (
    token_temperature_of_entropy as token_temperature_of_entropy,
)
from rlhf_jax.measure.world_filter import Beliefs as Beliefs
from rlhf_jax.measure.world_filter import beliefs as beliefs
from rlhf_jax.measure.world_filter import beliefs_in_jax as beliefs_in_jax
from rlhf_jax.measure.world_filter import filter_predictions as filter_predictions
from rlhf_jax.measure.worlds import Worlds as Worlds
