"""Studies: arms × paired seeds, claims named beforehand, verdicts by a rule stated before."""

from rlhf_jax.study.design import Arm as Arm
from rlhf_jax.study.design import Claim as Claim
from rlhf_jax.study.design import Settings as Settings
from rlhf_jax.study.design import Study as Study
from rlhf_jax.study.design import Train as Train
from rlhf_jax.study.design import Trained as Trained
