"""What is worth asking: numbers for questions, the higher the more an answer would tell.

Of comparisons, by an ensemble of reward models: `scores [m, n, k]`, m models on n groups of k texts
(`labelling.compare` asks by them). Of premises, by an argument: `root(p) -> probability` of a
conclusion from those of its independent premises, such as `any_of(all_of(p[0], p[1]), p[2])`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int


def top(scores: Float[Array, "n"], count: int) -> Int[Array, "c"]:
    """Which `count` questions have the highest numbers, best first; the earlier one of equals."""
    return jax.lax.top_k(scores, count)[1]


def variance(scores: Float[Array, "m n k"]) -> Float[Array, "n"]:
    """Var over the models of σ(r₁ − r₂) (Christiano et al. 2017, §2.2.4); k texts: ½ Σ Var softmax.

    Biased: divided by m.
    """
    return 0.5 * jax.nn.softmax(scores, axis=-1).var(axis=0).sum(axis=-1)


def bald(scores: Float[Array, "m n k"]) -> Float[Array, "n"]:
    """H(mean of the models' answers) − mean of their H, nats (Houlsby et al. 2011, eq. 2).

    The information that the answer carries about which model is right: a pair that all models find
    even tells nothing.
    """
    p = jax.nn.softmax(scores, axis=-1)
    return entr(p.mean(axis=0)).sum(axis=-1) - entr(p).sum(axis=-1).mean(axis=0)


def entropy(scores: Float[Array, "m n k"]) -> Float[Array, "n"]:
    """H(mean of the models' answers), nats: unsure, be it for lack of data or for an even pair."""
    return entr(jax.nn.softmax(scores, axis=-1).mean(axis=0)).sum(axis=-1)


def all_of(*p: Array) -> Array:
    """P(all) = Π pᵢ of independent premises."""
    return jnp.prod(jnp.stack(p), axis=0)


def any_of(*p: Array) -> Array:
    """P(any) = 1 − Π (1 − pᵢ) of independent premises."""
    return 1.0 - jnp.prod(1.0 - jnp.stack(p), axis=0)


def importance(root: Callable[[Array], Array], p: Float[Array, "n"]) -> Float[Array, "n"]:
    """∂P(root)/∂pᵢ = P(root | i) − P(root | not i) (Birnbaum 1969): what hangs on a premise.

    The two are the same where `root` is linear in each pᵢ: a premise that stands in an argument
    twice must stand in its formula once.
    """
    return jax.grad(root)(p)


def variance_removed(root: Callable[[Array], Array], p: Float[Array, "n"]) -> Float[Array, "n"]:
    """pᵢ (1 − pᵢ) Iᵢ², I the importance: Var P(root | answer), which one answer takes away."""
    return p * (1.0 - p) * importance(root, p) ** 2


def weighted_entropy(root: Callable[[Array], Array], p: Float[Array, "n"]) -> Float[Array, "n"]:
    """H(pᵢ) |Iᵢ|, nats: how unknown a premise is, times what hangs on it."""
    return binary_entropy(p) * jnp.abs(importance(root, p))


def mutual_information(root: Callable[[Array], Array], p: Float[Array, "n"]) -> Float[Array, "n"]:
    """I(premise i; root) = H(P) − E H(P | answer), nats: what an answer tells of the conclusion."""
    whole, slope = root(p), importance(root, p)
    if_true, if_false = whole + (1.0 - p) * slope, whole - p * slope
    left = p * binary_entropy(if_true) + (1.0 - p) * binary_entropy(if_false)
    return binary_entropy(whole) - left


def binary_entropy(p: Array) -> Array:
    """−p log p − (1 − p) log(1 − p), nats; 0 at 0 and 1."""
    p = jnp.clip(p, 0.0, 1.0)  # rounding may leave the interval
    return entr(p) + entr(1.0 - p)
