"""The same PPO without the KL penalty: how far does the policy drift for the same reward?

    rlhf-jax train experiments/sentiment/no_kl.py --out runs/sentiment_no_kl

Expect a score of 0.98 at 140 nats per sample (with KL: 0.63 at 4.5), an entropy of 1.6 nats per
token (4.7), and one word said again and again: what the word list likes best.
"""

from __future__ import annotations

from dataclasses import replace

import ppo

from rlhf_jax.config import Config
from rlhf_jax.rewards import KL


def config() -> Config:
    """`ppo.py` but for the price of KL."""
    base = ppo.config()
    free = replace(base.rollouts, kl=KL(initial=0.0, adaptive=False))
    return replace(base, name="sentiment_no_kl", rollouts=free)
