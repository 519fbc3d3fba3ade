"""Texts of sticky worlds, and what a language model of them is fine-tuned towards: one world.

The process is `rlhf_jax.measure.Worlds`: four worlds that say tokens of their own blocks, SEG after
which a world is drawn anew, and two contexts, CHAT and CODE, that are answered by a uniform digit.
The wanted world is the rarest, the last one. What a text earns is the share of its tokens that are
of that world's block, so whatever can be earned under a KL penalty is known: `levels` has the exact
distribution of a text's earnings under the process, and tilting that is all an optimum does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from rlhf_jax import measure
from rlhf_jax.data.drawn import one_prompt
from rlhf_jax.measure import Worlds
from rlhf_jax.types import Labeled, Prompts, Rollout

PROCESS = Worlds(segment=0.02, chat=0.02, code=0.02)


@dataclass(frozen=True)
class Prior:
    """The task in a size."""

    worlds: Worlds = PROCESS
    length: int = 32  # tokens of a text, behind BOS
    moved: float = 0.9  # the wanted world's share when pretraining is reweighted

    def __post_init__(self):
        if not 0 < self.moved < 1 or self.length < 16:
            raise ValueError(
                f"moved={self.moved} is a share between 0 and 1, length={self.length} 16 or more"
            )

    @property
    def wanted(self) -> int:
        """The world that fine-tuning is after."""
        return len(self.worlds.prior) - len(self.worlds.borrowed) - 1

    @property
    def reweighted(self) -> Worlds:
        """The process with the wanted world's share at `moved`, the others' in proportion."""
        old = np.asarray(self.worlds.prior)
        prior = old * (1 - self.moved) / (1 - old[self.wanted])
        prior[self.wanted] = self.moved
        return replace(self.worlds, prior=tuple(prior / prior.sum()))

    @property
    def alone(self) -> Worlds:
        """The wanted world alone, CHAT unanswered and no CODE: what supervised learning sees."""
        prior = tuple(1.0 * (w == self.wanted) for w in range(len(self.worlds.prior)))
        return replace(self.worlds, prior=prior, answered=0.0, code=0.0)


def texts(key: jax.Array, rows: int, *, worlds: Worlds, length: int) -> Labeled:
    """Texts of a process, for `drawn`."""
    return worlds.draw(key, rows, length=length)


def documents(key: jax.Array, rows: int, *, worlds: Worlds, length: int, count: int) -> Labeled:
    """Rows of a corpus of so many texts, which is the same in every seed."""
    chosen = jax.random.randint(key, (rows,), 0, count)
    each = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(20240), i))(chosen)
    found = jax.vmap(lambda k: worlds.draw(k, 1, length=length))(each)
    return jax.tree.map(lambda x: x[:, 0], found)


def start(key: jax.Array, rows: int, *, worlds: Worlds) -> Prompts:
    """BOS, as prompts for `drawn`."""
    return one_prompt(key, rows, tokens=(worlds.bos,))


def by_token(rollout: Rollout, params, *, task: Prior):
    """1/length on each token of the wanted world's block."""
    del params
    hit = task.worlds.says(rollout.tokens, task.wanted) & rollout.mask
    return hit.astype(jnp.float32) / task.length


def levels(worlds: Worlds, *, length: int, world: int) -> np.ndarray:
    """P(c of a text's tokens are of a world's block) under the process, c = 0 … length; exact."""
    hit, rest = _moves(worlds, world)
    mass = np.zeros((length + 1, len(hit)))
    mass[0, : len(worlds.prior)] = worlds.prior
    for _ in range(length):
        mass = np.pad(mass @ hit, ((1, 0), (0, 0)))[:-1] + mass @ rest
    return mass.sum(axis=1)


def tilted_share(prompts: np.ndarray, task: Prior, *, beta: float, lags: int) -> np.ndarray:
    """The share of the wanted world's tokens at each of the next `lags` under the optimum of KL-RL.

    Given prompts [n, t] that end in a token of a world, mean over them. π*(rest | prompt) ∝
    π₀(rest | prompt) e^{r/β}: backward through what the process may do, weighted by what it earns.
    """
    hit, rest = _moves(task.worlds, task.wanted)
    hit = hit * np.exp(1 / (task.length * beta))
    values = [np.ones(len(hit))]
    for _ in range(lags):
        values.append((hit + rest) @ values[-1])
        values[-1] /= values[-1].max()  # only ratios count
    believed = measure.forecast(prompts, task.worlds, lags=0)[:, 0]
    mass, found = np.pad(believed, ((0, 0), (0, believed.shape[1]))), []
    for after in values[-2::-1]:
        paid, other = ((mass @ kind) * after for kind in (hit, rest))
        found.append((paid.sum(axis=1) / (paid + other).sum(axis=1)).mean())
        mass = mass @ (hit + rest)
        mass /= mass.max(axis=1, keepdims=True)
    return np.array(found)


def _moves(worlds: Worlds, world: int) -> tuple[np.ndarray, np.ndarray]:
    """P(a token of the world's block, next state | state), and of any other token: [s, s] each.

    A state is the world of the coming token, and whether a digit is due: first those where none is.
    """
    prior, w = np.asarray(worlds.prior), len(worlds.prior)
    kept = (1 - worlds.switch) * np.eye(w) + worlds.switch * prior
    inside = worlds.emission[:, worlds.says(np.arange(worlds.surface), world)].sum(axis=1)
    words, contexts = 1 - sum(worlds.signs), worlds.chat + worlds.code
    hit, rest = np.zeros((2, 2 * w, 2 * w))
    hit[:w, :w] = words * inside[:, None] * kept
    rest[:w, :w] = words * (1 - inside)[:, None] * kept + worlds.segment * prior
    rest[:w, :w] += contexts * (1 - worlds.answered) * kept
    rest[:w, w:] = contexts * worlds.answered * kept
    rest[w:, :w] = kept
    return hit, rest


def tilted(p: np.ndarray, *, beta: float) -> dict[str, float]:
    """Where KL-RL ends whose reward is the level: E r, KL and J = E r − β KL = β log E₀ e^{r/β}.

    π* = π₀ e^{r/β}/Z (Korbak et al. 2022) changes no text's probability within a level, so that
    KL(π*‖π₀) is that of the levels' distributions.
    """
    reward = np.arange(len(p)) / (len(p) - 1)
    with np.errstate(divide="ignore"):
        log_weight = np.log(p) + reward / beta
    total = scipy.special.logsumexp(log_weight)
    expected = float(np.exp(log_weight - total) @ reward)
    return {
        "reward": expected,
        "kl": expected / beta - float(total),
        "objective": beta * float(total),
    }


def kl_of_levels(count: np.ndarray, p: np.ndarray) -> float:
    """KL of the levels of some texts to the process's p, nats; less its bias (kinds − 1)/2n."""
    share = np.bincount(count, minlength=len(p)) / len(count)
    seen = share > 0
    return float(share[seen] @ np.log(share[seen] / p[seen])) - (seen.sum() - 1) / (2 * len(count))
