"""The task of `experiments/tasks/chain.py` in its smallest size: four tokens, three positions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import toys

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # a study loads this file, too

from tasks import chain

TASK = chain.Chain(vocab=4, length=3)
BETA, BOS = 0.5, TASK.start  # the price of drifting from the chain, and the token texts start with

CHAIN = chain.law(4)  # [5, 4]
OUTPUTS = TASK.outputs
TEXTS = OUTPUTS.tokens  # [64, 4], the start included
START = TASK.p  # the chain's probability of each text

REFERENCE = toys.Table(5)  # the chain as a model


def reference_params():
    """Its weights."""
    return toys.markov(np.log(CHAIN), np.zeros(5))


token_reward_of, reward_of = TASK.token_reward_of, TASK.reward_of
TOKEN_REWARD = TASK.token_reward  # [64, 4], 0 at the start
REWARD = TASK.reward  # [64]

FourTokens = chain.Speaker  # reads five tokens, says four
MODEL = FourTokens(vocab=5, width=32, layers=1, heads=4, kv_heads=2, mlp=64, value_head=True)
