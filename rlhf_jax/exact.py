"""Exact answers, where a policy is small enough to write down everything it can say.

Enumerate the texts, ask a model for their probabilities, and measure: `p [n]` is a distribution
over the n texts, `reward` is `[n]`, or `[n, t]` by token; both are numpy, float64, and everything
is in nats. What a method should end at is in `exact_optima`, its expected gradient in
`exact_gradients`.

    outputs = enumerate_outputs(prompt=[0], vocab=5, length=3, stop=[1])
    start = probabilities(reference_params, outputs, model=model)
    best = exact_optima.tilted(start, reward, beta=0.5)
    found = probabilities(trained_params, outputs, model=model)
    kl(found, best), kl_by_position(found, start, outputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.score import score
from rlhf_jax.types import Params, Sequences


@struct.dataclass
class Tempered(Sequences):
    """Texts whose log-probabilities are taken at a temperature."""

    temperature: Float[Array, "b"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """Every text that can follow one prompt, in the order of a dictionary; `enumerate_outputs`."""

    tokens: Int[np.ndarray, "n t"]  # the prompt included; `pad` behind texts that ended early
    mask: Bool[np.ndarray, "n t"]  # tokens the policy chose, a stop token included
    alphabet: tuple[int, ...] | None = None  # None: all of the vocabulary may be drawn

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def prefix(self) -> Int[np.ndarray, "n t+1"]:
        """Which state a text is in before token t: texts share a number if they agree so far."""
        new = np.zeros((len(self), self.tokens.shape[1] + 1), bool)
        new[1:, 1:] = np.logical_or.accumulate(self.tokens[1:] != self.tokens[:-1], axis=1)
        return np.cumsum(new, axis=0)

    def steps(self, at: int) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
        """The m states after token `at`: one text that goes through each, and the state before."""
        _, row = np.unique(self.prefix[:, at + 1], return_index=True)
        return row, self.prefix[row, at]

    def only(self, keep: Bool[np.ndarray, "n"]) -> Outputs:
        """Some of the texts."""
        return Outputs(self.tokens[keep], self.mask[keep], self.alphabet)

    def batch(self, temperature: float = 1.0) -> Tempered:
        """The texts as a batch of n rows."""
        used = self.mask | (np.arange(self.tokens.shape[1]) < self.mask.argmax(axis=1)[:, None])
        rows = jnp.full((len(self),), temperature, jnp.float32)
        arrays = (self.tokens.astype(np.int32), self.mask, used.astype(np.int32))
        return Tempered(*map(jnp.asarray, arrays), rows)


def enumerate_outputs(
    *,
    prompt: Sequence[int],
    vocab: int,
    length: int,
    stop: Sequence[int] = (),
    alphabet: Sequence[int] | None = None,
    pad: int = 0,
    limit: int = 1_000_000,
) -> Outputs:
    """All texts of up to `length` tokens after a prompt: those that reach it, those a stop ends.

    `alphabet` restricts what may be drawn; a model's other tokens are then banned, as by
    `Sampling(banned=...)`, and its probabilities renormalised token by token.

    Raises:
        ValueError: if there are more than `limit` texts, saying what to reduce; for ids outside the
            vocabulary; for an empty prompt.
    """
    if len(prompt) < 1 or length < 1:
        raise ValueError(f"needs a prompt of at least 1 token and length ≥ 1, not {length}")
    letters = tuple(range(vocab)) if alphabet is None else tuple(sorted(set(alphabet)))
    if not letters or not all(0 <= i < vocab for i in (*letters, *stop)):
        raise ValueError(f"stop {list(stop)} and alphabet {letters} must be ids below {vocab}")
    size, ends = len(letters), len(set(letters) & set(stop))

    def texts(length, size):
        going = size - min(ends, size)  # tokens after which a text goes on
        short = sum(going**i * (size - going) for i in range(length - 1))
        return short + going ** (length - 1) * size

    if texts(length, size) > limit:
        fitting = max((i for i in range(1, length) if texts(i, size) <= limit), default=0)
        narrow = max((i for i in range(1, size) if texts(length, i) <= limit), default=0)
        ways = [f"reduce length to {fitting}"] if fitting else []
        ways += [f"name an alphabet of {narrow} tokens"] if narrow else []
        raise ValueError(
            f"{size} tokens at up to {length} places make {texts(length, size):,} texts, more than "
            f"limit={limit:,}; {', '.join([*ways, 'or raise the limit'])}"
        )
    rows, ended = np.zeros((1, 0), np.int32), np.zeros(1, bool)
    chosen = np.zeros((1, 0), bool)
    for _ in range(length):
        children = np.where(ended, 1, size)
        parent = np.repeat(np.arange(len(rows)), children)
        child = np.arange(len(parent)) - (np.cumsum(children) - children)[parent]
        over = ended[parent]
        token = np.where(over, pad, np.array(letters)[child])
        rows = np.column_stack([rows[parent], token])
        chosen = np.column_stack([chosen[parent], ~over])
        ended = over | np.isin(token, np.array(stop, np.int64))
    before = np.broadcast_to(np.array(prompt, np.int32), (len(rows), len(prompt)))
    tokens = np.concatenate([before, rows.astype(np.int32)], axis=1)
    mask = np.concatenate([np.zeros(before.shape, bool), chosen], axis=1)
    return Outputs(tokens, mask, None if alphabet is None else letters)


def probabilities(
    params: Params,
    outputs: Outputs,
    *,
    model: Any,
    temperature: float = 1.0,
    rows: int = 4096,
) -> Float[np.ndarray, "n"]:
    """The distribution of a model over its texts, `rows` of them at a time.

    The model computes in float32; what rounding leaves of a sum of 1 is divided out.

    Raises:
        ValueError: if the model says something that was not enumerated.
    """
    logp = token_logp(params, outputs, model=model, temperature=temperature, rows=rows)
    p = np.exp(logp.sum(axis=1))
    if not abs(p.sum() - 1) < 1e-3:
        raise ValueError(
            f"the probabilities of the {len(p)} texts sum to {p.sum():.6f}, not 1: enumerate the "
            "model's own vocabulary and stop ids, or name the tokens it may say as the alphabet"
        )
    return p / p.sum()


def token_logp(
    params: Params,
    outputs: Outputs,
    *,
    model: Any,
    temperature: float = 1.0,
    rows: int = 4096,
) -> Float[np.ndarray, "n t"]:
    """What a model gives each token after those before it: log-probabilities, 0 outside the mask.

    `model` must be hashable (a frozen dataclass): it is a static argument of one compiled program.
    """
    batch = outputs.batch(temperature)
    found = []
    for start in range(0, len(outputs), rows):
        # The last part is filled up with its own first row: one shape, one program.
        index = np.arange(start, start + min(rows, len(outputs)))
        index = np.where(index < len(outputs), index, start)
        part = jax.tree.map(lambda x, index=index: x[index], batch)
        found.append(batch_logp(params, part, model=model, alphabet=outputs.alphabet))
    return np.concatenate([np.asarray(x, np.float64) for x in found])[: len(outputs)]


@partial(jax.jit, static_argnames=("model", "alphabet"))
def batch_logp(
    params: Params, batch: Sequences, *, model: Any, alphabet: tuple[int, ...] | None = None
) -> Float[Array, "b t"]:
    """The same of a batch, in JAX, with a gradient."""
    if alphabet is None:
        return score({"self": params}, batch, models={"self": model}).logp
    ids = np.array(alphabet)

    def allowed(logits, _):
        return {"allowed": jax.nn.logsumexp(logits["self"][:, ids], axis=-1)}

    scores = score({"self": params}, batch, models={"self": model}, vocab=allowed)
    return scores.logp - scores.extra["allowed"]


def conditionals(p: Float[np.ndarray, "n"], outputs: Outputs) -> Float[np.ndarray, "n t"]:
    """Of each token given those before it: log p, 0 outside the mask; −inf where p says neither."""
    p = distribution(p, len(outputs))
    mass = np.stack([np.bincount(x, p)[x] for x in outputs.prefix.T], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(mass[:, 1:] > 0, np.log(mass[:, 1:]) - np.log(mass[:, :-1]), -np.inf)
    return np.where(outputs.mask, np.minimum(found, 0.0), 0.0)


def entropy(p: Float[np.ndarray, "n"]) -> float:
    """−Σ p log p, nats per text."""
    p = distribution(p)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def kl(p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"]) -> float:
    """KL(p‖q) = Σ p log(p/q), nats per text; inf where p says what q cannot."""
    p = distribution(p)
    q = distribution(q, len(p))
    possible = p > 0
    p, q = p[possible], q[possible]
    return float((p * (np.log(p) - np.log(q))).sum()) if (q > 0).all() else float("inf")


def kl_by_position(
    p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"], outputs: Outputs
) -> Float[np.ndarray, "t"]:
    """E_p KL(p(·|prefix)‖q(·|prefix)) of each token, nats; the sum over tokens is `kl(p, q)`."""
    p = distribution(p, len(outputs))
    q, possible = conditionals(q, outputs), p > 0
    gap = conditionals(p, outputs)[possible] - q[possible]
    return (p[possible, None] * gap).sum(axis=0)


def kl_between_and_within(
    p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"], statistic: Float[np.ndarray, "n"]
) -> tuple[float, float]:
    """KL(p‖q) as KL of the statistic's distributions + E KL among texts of one level (chain rule).

    With the reward as the statistic, the second part is what a method changes for nothing.
    """
    between = kl(levels(p, statistic)[1], levels(q, statistic)[1])
    return between, kl(p, q) - between


def levels(
    p: Float[np.ndarray, "n"], statistic: Float[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """The values a statistic takes, ascending, and their probabilities; equal to 9 decimals."""
    value, index = np.unique(np.round(statistic, 9), return_inverse=True)
    return value, np.bincount(index, distribution(p, len(index)))


def state_values(
    p: Float[np.ndarray, "n"], reward: np.ndarray, outputs: Outputs
) -> Float[np.ndarray, "n t"]:
    """V(state before token t) = E_p[what is still to come | prefix]; 0 outside the mask.

    States that p never reaches have value 0.
    """
    p, reward = distribution(p, len(outputs)), token_rewards(reward, outputs)
    to_come = np.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    found = [_mean(p, to_come[:, i], x) for i, x in enumerate(outputs.prefix.T[:-1])]
    return np.where(outputs.mask, np.stack(found, axis=1), 0.0)


def advantages(
    p: Float[np.ndarray, "n"], reward: np.ndarray, outputs: Outputs
) -> Float[np.ndarray, "n t"]:
    """A = r + V′ − V under p itself: a martingale's steps, so that Var(R) = Σ_t E A_t².

    The credit that each token truly deserves: 0 for one that does not matter.
    """
    reward, value = token_rewards(reward, outputs), state_values(p, reward, outputs)
    later = np.pad(value[:, 1:], ((0, 0), (0, 1)))
    return np.where(outputs.mask, reward + later - value, 0.0)


def token_rewards(reward: np.ndarray, outputs: Outputs) -> Float[np.ndarray, "n t"]:
    """Rewards by token; one number per text lands on its last token.

    Raises:
        ValueError: if the shape is neither [n] nor [n, t], or a token's reward depends on what
            comes after it.
    """
    reward, mask = np.asarray(reward, np.float64), outputs.mask
    if reward.shape == mask.shape[:1]:
        last = mask & (np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
        return np.where(last, reward[:, None], 0.0)
    if reward.shape != mask.shape:
        raise ValueError(
            f"a reward is one number per text [{len(mask)}] or one per token {list(mask.shape)}; "
            f"this one is {list(reward.shape)}"
        )
    reward = np.where(mask, reward, 0.0)
    for at in range(mask.shape[1]):
        row, _ = outputs.steps(at)
        wrong = ~np.isclose(reward[:, at], reward[row, at][outputs.prefix[:, at + 1]])
        if wrong.any():
            text = outputs.tokens[np.flatnonzero(wrong)[0], : at + 1].tolist()
            raise ValueError(
                f"the reward of the last token of {text} depends on what comes after it; give one "
                "number per text instead"
            )
    return reward


def distribution(p: np.ndarray, n: int | None = None) -> Float[np.ndarray, "n"]:
    """`p` in float64.

    Raises:
        ValueError: unless it is `[n]`, not negative, and sums to 1.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or (n is not None and len(p) != n):
        expected = "one number per text" if n is None else f"[{n}], one number per text"
        raise ValueError(f"a distribution is {expected}; this one is {list(p.shape)}")
    if not (p >= 0).all() or not abs(p.sum() - 1) < 1e-6:
        raise ValueError(
            f"a distribution has no negative number and sums to 1; this one has least {p.min()} "
            f"and sum {p.sum()}. Divide by the sum, or condition on what was left out"
        )
    return p


def _mean(p, x, group):
    """E_p[x | group] at each text of the group; 0 where the group is impossible."""
    mass, total = np.bincount(group, p), np.bincount(group, p * x)
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)[group]
