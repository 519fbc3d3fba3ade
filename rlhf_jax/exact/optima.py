"""Where methods end: the exact distributions that objectives, selection and heat lead to.

`p [n]` is a distribution over the texts of an `Outputs`, `reward` is `[n]`, or `[n, t]` by token
and 0 outside the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from rlhf_jax.exact.measures import conditionals, distribution, entropy, kl, token_rewards
from rlhf_jax.exact.outputs import Outputs


def tilted(p: Float[np.ndarray, "n"], reward: np.ndarray, *, beta: float) -> Float[np.ndarray, "n"]:
    """Maximum of E[R] − β KL(·‖p): p exp(R/β)/Z, where RL with a KL penalty ends (Korbak 2022)."""
    score = _log(p) + _total(reward, p) / _positive(beta, "beta", "β → 0 is conditioned(p, best)")
    return np.exp(score - logsumexp(score))


def tilted_value(p: Float[np.ndarray, "n"], reward: np.ndarray, *, beta: float) -> float:
    """β log Z = β log E_p exp(R/β): that maximum's value, in units of the reward."""
    beta = _positive(beta, "beta", "β → 0 gives max R")
    return float(beta * logsumexp(_log(p) + _total(reward, p) / beta))


def maxent(reward: np.ndarray, *, temperature: float) -> Float[np.ndarray, "n"]:
    """exp(R/τ)/Z: the maximum of E[R] + τ H (Ziebart 2010). R = log p gives p^{1/τ}/Z."""
    score = _total(reward) / _positive(temperature, "temperature", "τ → 0 is the best text")
    return np.exp(score - logsumexp(score))


def maxent_value(reward: np.ndarray, *, temperature: float) -> float:
    """τ log Σ exp(R/τ): that maximum's value."""
    temperature = _positive(temperature, "temperature", "τ → 0 gives max R")
    return float(temperature * logsumexp(_total(reward) / temperature))


def conditioned(p: Float[np.ndarray, "n"], good: np.ndarray) -> Float[np.ndarray, "n"]:
    """P(text | good) = p P(good|text) / P(good); `good` is that probability, or True and False.

    With P(good|text) = σ(R) it is the tilt by log σ(R) at β = 1: RL as inference (Levine 2018).
    """
    p = distribution(p)
    good = np.asarray(good, np.float64)
    if good.shape != p.shape or not ((good >= 0) & (good <= 1)).all():
        raise ValueError(f"`good` is a probability per text [{len(p)}], between 0 and 1")
    if not (p * good).sum() > 0:
        raise ValueError("the event has probability 0: no text that p says can be good")
    return p * good / (p * good).sum()


def posteriors(
    p: Float[np.ndarray, "n"], likelihood: Float[np.ndarray, "n c"]
) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c n"]]:
    """P(tag) and P(text | tag), for P(tag | text): what conditioning on each of c tags says.

    `linear_pool(laws, probability)` of the two is p again: without its tag, nothing has changed.
    """
    p, likelihood = distribution(p), np.asarray(likelihood, np.float64)
    if likelihood.shape[:1] != p.shape or not np.allclose(likelihood.sum(axis=-1), 1):
        raise ValueError(f"`likelihood` is P(tag|text), [{len(p)}, tags]; rows sum to 1")
    return p @ likelihood, np.stack([conditioned(p, tag) for tag in likelihood.T])


def mutual_information(p: Float[np.ndarray, "n"], likelihood: Float[np.ndarray, "n c"]) -> float:
    """I(text; tag) = Σ_c P(c) KL(P(text|c)‖p), nats: what a tag tells about its text."""
    probability, laws = posteriors(p, likelihood)
    return float(sum(w * kl(law, p) for w, law in zip(probability, laws, strict=True)))


def best_of_n(p: Float[np.ndarray, "n"], reward: np.ndarray, n: int) -> Float[np.ndarray, "n"]:
    """The best of n samples: level R has probability F(R)ⁿ − F(R⁻)ⁿ, its texts share it as under p.

    F is the reward's distribution function under p, so ties are exact (Beirami et al. 2024). Best
    of a of the best of b is best of ab; win rate over p tends to n/(n + 1).
    """
    p = distribution(p)
    if n < 1:
        raise ValueError(f"best of {n}: needs at least 1 sample")
    _, index = np.unique(np.round(_total(reward, p), 9), return_inverse=True)
    mass = np.bincount(index, p)
    above = np.minimum(np.cumsum(mass), 1.0)
    share = above**n - np.concatenate([[0.0], above[:-1]]) ** n
    found = np.divide(p, mass[index], out=np.zeros_like(p), where=p > 0) * share[index]
    return found / found.sum()


def best_of_n_bound(n: int) -> float:
    """Bound of KL(best of n‖p): log n − (n − 1)/n nats, reached only if no two texts tie.

    Often quoted as an equality; Beirami et al. 2024 show that it is a bound.
    """
    return float(np.log(n) - (n - 1) / n)


def horizon_optimum(
    p: Float[np.ndarray, "n"],
    reward: np.ndarray,
    outputs: Outputs,
    *,
    beta: float,
    horizon: int | None = None,
    discount: float = 1.0,
    kl_in_return: bool = False,
) -> Float[np.ndarray, "n"]:
    """Each token maximises E[return of h tokens, its own the first] − β KL at its own state.

    π(a|s) ∝ p(a|s) exp(Q_h(s, a)/β), backwards over the states; later tokens follow their own such
    π. With `kl_in_return` the return has −β KL of the later tokens of the window in it, as when the
    penalty is part of the reward: for h > 1 tokens then also care where the penalty will be small,
    and before the reward's window they differ from p. Without it the KL is a local regulariser.
    `horizon=None` reaches the end: with `kl_in_return` and discount 1 that is `tilted`.
    """
    p = distribution(p, len(outputs))
    rewards = token_rewards(reward, outputs)
    _positive(beta, "beta", "β → 0 is greedy")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon {horizon}: at least 1, the token itself; None is to the end")
    found = np.zeros_like(p)
    said = p > 0
    found[said] = np.exp(
        _horizon(p[said], rewards[said], outputs.only(said), beta, horizon, discount, kl_in_return)
    )
    return found / found.sum()


def _horizon(p, reward, outputs, beta, horizon, discount, kl_in_return):
    """Its log, for p > 0."""
    logp, t = conditionals(p, outputs), outputs.tokens.shape[1]
    window = t if horizon is None else min(horizon, t)
    # ahead[k][s]: the expected return of the next k tokens from state s.
    ahead = np.zeros((window, len(outputs)))
    total = np.zeros(len(outputs))
    for at in range(t - 1, -1, -1):
        row, state = outputs.steps(at)
        base, earned = logp[row, at], reward[row, at]
        log_q = _normalise(base + (earned + discount * ahead[-1]) / beta, state)
        penalty = np.bincount(state, np.exp(log_q) * (log_q - base)) * beta * kl_in_return
        returns = [
            np.bincount(state, np.exp(log_q) * (earned + discount * later)) - penalty
            for later in ahead[:-1]
        ]
        ahead = np.stack([np.zeros(state.max() + 1), *returns])
        total += log_q[outputs.prefix[:, at + 1]]
    return total


def log_pool(
    laws: Sequence[Float[np.ndarray, "n"]], weights: Sequence[float]
) -> Float[np.ndarray, "n"]:
    """Minimum of Σ wᵢ KL(·‖pᵢ): Π pᵢ^wᵢ / Z, the intersection (Hinton 2002, products of experts).

    A generator that several perfect discriminators reward with Σ wᵢ logit Dᵢ ends there.
    """
    score = _log_pool(laws, weights)
    return np.exp(score - logsumexp(score))


def log_pool_cost(laws: Sequence[Float[np.ndarray, "n"]], weights: Sequence[float]) -> float:
    """−log Z = min Σ wᵢ KL(·‖pᵢ), nats, for weights that sum to 1."""
    if not abs(sum(weights) - 1) < 1e-6:
        raise ValueError(f"the weights {list(weights)} must sum to 1")
    return float(-logsumexp(_log_pool(laws, weights)))


def linear_pool(
    laws: Sequence[Float[np.ndarray, "n"]], weights: Sequence[float]
) -> Float[np.ndarray, "n"]:
    """Minimum of Σ wᵢ KL(pᵢ‖·): Σ wᵢ pᵢ, the union; likelihood, or one discriminator, on it all."""
    return distribution(weights, len(laws)) @ np.stack([distribution(p) for p in laws])


def sequence_temperature(p: Float[np.ndarray, "n"], temperature: float) -> Float[np.ndarray, "n"]:
    """p(text)^{1/T} / Z: heat over whole texts, which is not `token_temperature`."""
    return maxent(_log(p), temperature=temperature)


def token_temperature(
    p: Float[np.ndarray, "n"], outputs: Outputs, temperature: float
) -> Float[np.ndarray, "n"]:
    """Π p(token|prefix)^{1/T} / Z(prefix): what a sampler at temperature T draws."""
    p = distribution(p, len(outputs))
    _positive(temperature, "temperature", "T → 0 is greedy")
    said = p > 0
    outputs = outputs.only(said)
    logp, total = conditionals(p[said], outputs), np.zeros(len(outputs))
    for at in range(logp.shape[1]):
        row, state = outputs.steps(at)
        total += _normalise(logp[row, at] / temperature, state)[outputs.prefix[:, at + 1]]
    found = np.zeros_like(p)
    found[said] = np.exp(total)
    return found / found.sum()


def temperature_of_entropy(p: Float[np.ndarray, "n"], target: float) -> float:
    """The sequence temperature at which p has an entropy of `target` nats, by bisection.

    Raises:
        ValueError: if no temperature gives it.
    """
    p = distribution(p)
    low, high = 1e-3, 1e6
    least, most = (entropy(sequence_temperature(p, t)) for t in (low, high))
    if not least <= target <= most:
        raise ValueError(
            f"entropy {target} is out of reach: heat takes this p from {least:.6f} to {most:.6f}"
        )
    for _ in range(100):
        middle = (low * high) ** 0.5
        below = entropy(sequence_temperature(p, middle)) < target
        low, high = (middle, high) if below else (low, middle)
    return (low * high) ** 0.5


def _total(reward, p=None):
    """Reward per text."""
    reward = np.asarray(reward, np.float64)
    total = reward.sum(axis=1) if reward.ndim == 2 else reward
    if total.ndim != 1 or (p is not None and len(total) != len(p)):
        size = "n" if p is None else len(p)
        raise ValueError(f"a reward is [{size}] or [{size}, t]; this one is {list(reward.shape)}")
    return total


def _log(p):
    p = distribution(p)
    return np.log(p, out=np.full_like(p, -np.inf), where=p > 0)


def _log_pool(laws, weights):
    if len(laws) != len(weights) or not all(w > 0 for w in weights):
        raise ValueError(f"{len(laws)} distributions need as many weights, all above 0: {weights}")
    return sum(w * _log(p) for p, w in zip(laws, weights, strict=True))


def _normalise(score, state):
    """Score − log Σ exp(score) over the steps from the same state."""
    top = np.full(state.max() + 1, -np.inf)
    np.maximum.at(top, state, score)
    return score - top[state] - np.log(np.bincount(state, np.exp(score - top[state])))[state]


def _positive(x, name, hint):
    if not x > 0:
        raise ValueError(f"{name} {x}: must be above 0 ({hint})")
    return x
