"""Independent references: rlax, and loops in float64."""

import warnings

import jax
import numpy as np
import pytest


def import_rlax():
    """Rlax, whose dependencies use names that newer versions of JAX deprecate, then drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import rlax
        except Exception as error:
            pytest.skip(f"rlax does not import under jax {jax.__version__}: {error}")
    return rlax


def gae_loop(reward, value, mask, discount, trace):
    """Advantages and targets of one row, as if its masked-out tokens were not there."""
    kept = np.flatnonzero(mask)
    r, v = np.asarray(reward, np.float64)[kept], np.asarray(value, np.float64)[kept]
    v = np.append(v, 0.0)
    advantage = np.zeros(len(mask))
    for i in range(len(kept)):
        deltas = [r[j] + discount * v[j + 1] - v[j] for j in range(i, len(kept))]
        advantage[kept[i]] = sum((discount * trace) ** k * d for k, d in enumerate(deltas))
    target = np.zeros(len(mask))
    target[kept] = advantage[kept] + v[:-1]
    return advantage, target
