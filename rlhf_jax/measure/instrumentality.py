"""Does a policy choose now for the sake of later? An index, and two toys with known answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit


def instrumentality_index(share: float, *, myopic: float, full: float) -> float:
    """ι = (logit P − logit P_myopic)/(logit P_full − logit P_myopic): 0 looks at now, 1 at all.

    P is the share of the choice that pays later; the other two are where the arm's objective leads
    with a horizon of one token and to the end, both built on the arm's own base. Arrays as well.
    """
    near, far = logit(np.asarray(myopic, np.float64)), logit(np.asarray(full, np.float64))
    if not (np.isfinite(near) & np.isfinite(far) & (near != far)).all():
        raise ValueError(
            f"myopic={myopic} and full={full}: two different shares between 0 and 1; if both "
            "horizons lead to the same share, it tells nothing about the horizon"
        )
    share = np.asarray(share, np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"a share is between 0 and 1, not {share}")
    return (logit(share) - near) / (far - near)


def abruptness(first: float, last: float) -> float:
    """KL of the last token / KL of the first: how much of the change waits until it must be made.

    A policy that sees an end coming changes its first choice; one that does not ends abruptly: inf.
    """
    if not (first >= 0 and last >= 0):
        raise ValueError(f"KL of {first} and {last} nats: neither is below 0")
    if first == 0:
        return math.nan if last == 0 else math.inf
    return last / first


@dataclass(frozen=True)
class PredictableFuture:
    """Text whose likelier start has the less certain future, as a task for who looks ahead.

    A, with probability `first`, then `length` tokens uniform over `keys`; or B, then `length` times
    the token 0. Each method returns P(B) where a way of training ends. Data, likelihood, a horizon
    of one token and conditioning without its tag say 1 − first.
    """

    first: float = 0.6
    keys: int = 4
    length: int = 4

    def __post_init__(self):
        if not 0 < self.first < 1 or self.keys < 2 or self.length < 1:
            raise ValueError(
                f"first={self.first}, keys={self.keys}, length={self.length}: a probability between"
                " 0 and 1, at least 2 keys, at least 1 token"
            )

    @property
    def odds(self) -> float:
        """Log-odds of B in the data, log b/a."""
        return math.log((1 - self.first) / self.first)

    def likelihood(self) -> float:
        """P(B) = b = 1 − first: the data's conditionals are the optimum, whatever comes later."""
        return 1 - self.first

    def token_temperature(self, temperature: float) -> float:
        """P(B) = b^{1/τ}/(a^{1/τ} + b^{1/τ}): a sampler's heat, token by token."""
        return self.with_horizon(1, temperature=temperature)

    def sequence_temperature(self, temperature: float) -> float:
        """P(B) = b^{1/τ}/(b^{1/τ} + a^{1/τ} K^{m(1−1/τ)}): p^{1/τ}/Z, MaxEnt on log p."""
        return self.with_horizon(1 + self.length, temperature=temperature)

    def with_horizon(self, horizon: float, *, temperature: float) -> float:
        """P(B) = σ((1/τ)[log(b/a) + (h − 1)(1 − τ) log K]): MaxEnt on log p of h tokens.

        Each key after A costs log K nats of likelihood, of which entropy pays τ log K back.
        """
        if not 1 <= horizon <= 1 + self.length:
            raise ValueError(f"horizon {horizon}: from 1, the token itself, to {1 + self.length}")
        later = (horizon - 1) * (1 - _positive(temperature)) * math.log(self.keys)
        return float(expit((self.odds + later) / temperature))

    def horizon(self, share: float, *, temperature: float) -> float:
        """ĥ = 1 + [τ logit P(B) − log(b/a)]/((1 − τ) log K): the window that explains this share.

        The inverse of `with_horizon`, for policies trained with that objective; not rounded, and
        not cut off at 1 or at the end.
        """
        if _positive(temperature) == 1:
            raise ValueError("temperature 1 leads to the data from any horizon: use another one")
        later = (1 - temperature) * math.log(self.keys)
        return float(1 + (temperature * logit(share) - self.odds) / later)

    def tilted(self, beta: float) -> float:
        """P(B) = b e/(b e + a ((1 − 1/K) + e/K)), e = exp(1/β): KL-RL paid 1 for a last token 0.

        The reward says nothing of A and B, but behind B it is free.
        """
        gain = -1 / _positive(beta, "beta")
        return self._against((1 - 1 / self.keys) * math.exp(gain) + 1 / self.keys)

    def conditioned(self) -> float:
        """P(B) = b/(b + a/K): told that the last token is 0. The limit β → 0 of `tilted`."""
        return self._against(1 / self.keys)

    def best_of_n(self, n: int) -> float:
        """P(B) = 1 − aⁿ: the likeliest of n own samples, where the text of B is the likeliest.

        Where each text of A is likelier, bⁿ; where they tie, b.
        """
        if n < 1:
            raise ValueError(f"best of {n}: needs at least 1 sample")
        ahead = self.odds + self.length * math.log(self.keys)
        if abs(ahead) < 1e-12:
            return self.likelihood()
        return 1 - self.first**n if ahead > 0 else self.likelihood() ** n

    def greedy_flip(self) -> float:
        """The γ* above which greedy RL on discounted log p takes B: log K Σ_{k≤m} γᵏ = log(a/b).

        0 if B is the likelier start already; inf if no discount up to 1 is enough.
        """

        def ahead(discount):
            powers = discount ** np.arange(1, self.length + 1)
            return self.odds + math.log(self.keys) * powers.sum()

        if ahead(0.0) >= 0:
            return 0.0
        return float(brentq(ahead, 0, 1, xtol=1e-14)) if ahead(1.0) >= 0 else math.inf

    def _against(self, a_pays: float) -> float:
        """P(B) if texts of A are worth so much of those of B."""
        b = self.likelihood()
        return b / (b + self.first * a_pays)


class Avoided(NamedTuple):
    """What a policy does about a continuation that is punished."""

    start: float  # P(C), the start that leads there
    punished_after_c: float
    punished: float  # in all


@dataclass(frozen=True)
class PunishedFuture:
    """Two starts, C with probability `start`, or D; then an end that is punished or is not.

    Under the base it is punished with probability `after_c` or `after_d`, and then earns `reward`,
    once, at the end.
    """

    start: float = 0.5
    after_c: float = 0.9
    after_d: float = 0.1
    reward: float = -1.0

    def __post_init__(self):
        if not all(0 < p < 1 for p in (self.start, self.after_c, self.after_d)):
            raise ValueError(
                f"start={self.start}, after_c={self.after_c}, after_d={self.after_d}: probabilities"
                " between 0 and 1"
            )

    def full(self, beta: float) -> Avoided:
        """KL-RL to the end: P ∝ base · exp(R/β). It avoids the start from which it would suffer."""
        log_c, log_d = (self._log_value(p, beta) for p in (self.after_c, self.after_d))
        return self._avoided(float(expit(logit(self.start) + log_c - log_d)), beta)

    def myopic(self, beta: float) -> Avoided:
        """KL-RL with a horizon of one token: the base's start, and an abrupt turn at the end."""
        return self._avoided(self.start, beta)

    def divergences(self, share: float, beta: float) -> tuple[float, float]:
        """KL to the base of the start and of the end, nats, of a policy with P(C) = share."""
        ends = ((share, self.after_c), (1 - share, self.after_d))
        last = sum(w * _kl(self._end(p, beta), p) for w, p in ends)
        return _kl(share, self.start), last

    def _end(self, p, beta):
        """P(punished) behind a start, tilted."""
        return float(expit(logit(p) + self.reward / _positive(beta, "beta")))

    def _log_value(self, p, beta):
        """The log E[exp(R/β)] behind a start."""
        return float(np.logaddexp(math.log1p(-p), math.log(p) + self.reward / beta))

    def _avoided(self, share, beta):
        c, d = self._end(self.after_c, beta), self._end(self.after_d, beta)
        return Avoided(share, c, share * c + (1 - share) * d)


def _kl(p, q):
    """KL of a coin, nats."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def _positive(x, name="temperature"):
    if not x > 0:
        raise ValueError(f"{name} {x}: must be above 0")
    return x
