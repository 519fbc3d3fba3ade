"""Exact expected gradients: over every batch a step could draw, and along the exact flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp
from scipy.special import log_softmax, softmax

from rlhf_jax import masked
from rlhf_jax.exact.measures import distribution, token_rewards
from rlhf_jax.exact.outputs import Outputs, batch_logp
from rlhf_jax.score import score
from rlhf_jax.types import Experience, Params, Scores, Sequences, Terms

PART = 4096  # batches at a time


def expected_gradient(
    params: Mapping[str, Params],
    texts: Sequences,
    p: Float[np.ndarray, "n"],
    *,
    models: Mapping[str, Any],
    objective: Callable[[Scores, Any], Terms | dict[str, Terms]],
    rows: int,
    advantage: Callable | None = None,
    prepare: Callable | None = None,
    vocab: Callable | None = None,
    limit: int = 5_000_000,
) -> tuple[float, Params]:
    """E[loss] and E[∇ loss] of one minibatch of `rows` independent draws from p: over all batches.

    Row i of `texts` is the text (or pair) of probability p[i], in any batch class the objective
    reads; `experience` makes one. In each batch `advantage`, a function of `rlhf_jax.advantages` or
    your own, makes `advantage` and `target` from the rows' reward, value, mask and prompt_id; then
    `prepare(scores, batch) -> batch` may use the scores, without gradient; then the objective's
    terms are weighted and divided as the trainer does. `params`, `models` and `vocab` are those of
    `score`: "self" is the learner.

    The model runs once: a row's scores depend on its text alone, so that the objective's gradients
    by the scores of each text are summed over the batches and then go through the model together.

    Raises:
        ValueError: if there are more than `limit` batches, saying what to reduce.
    """
    n = texts.tokens.shape[0]
    p = distribution(p, n)
    if rows < 1:
        raise ValueError(f"rows {rows}: a batch has at least 1")
    said = np.flatnonzero(p)
    batches = len(said) ** rows
    if batches > limit:
        most = int(np.log(limit) / np.log(len(said)))
        raise ValueError(
            f"{len(said)} texts in {rows} rows make {batches:,} batches, more than limit={limit:,};"
            f" use rows={most}, or fewer texts (at most {int(limit ** (1 / rows))}), or raise limit"
        )
    texts, weight = jax.tree.map(lambda x: jnp.asarray(x)[said], texts), jnp.asarray(p[said])

    def scores_of(own):
        return score({**params, "self": own}, texts, models=models, vocab=vocab)

    def loss(scores, batch):
        if advantage is not None:
            fields = {name: getattr(batch, name) for name in ("reward", "value", "mask")}
            found, target = advantage(**fields, prompt_id=batch.prompt_id)
            batch = batch.replace(advantage=found, target=target, group_tokens=_group_tokens(batch))
        if prepare is not None:
            batch = prepare(scores, batch)
        # What stands in the batch was made before the update: no gradient passes through it.
        return _trainer_value(objective(scores, jax.lax.stop_gradient(batch)))

    @jax.jit
    def part(scores, start):
        number = start + jnp.arange(PART)
        place = len(said) ** np.arange(rows)
        index = number[:, None] // place[None] % len(said)
        probability = jnp.where(number < batches, weight[index].prod(axis=1), 0.0)
        drawn = jax.tree.map(lambda x: x[index], (scores, texts))
        value, grads = jax.vmap(jax.value_and_grad(loss))(*drawn)

        def by_text(x):  # E[gradient by this text's scores], wherever in the batch it stands
            x = x * probability.reshape(-1, *[1] * (x.ndim - 1))
            return jnp.zeros((len(said), *x.shape[2:])).at[index].add(x)

        return (value * probability).sum(), jax.tree.map(by_text, grads)

    scores = jax.jit(scores_of)(params["self"])
    found = [jax.device_get(part(scores, start)) for start in range(0, batches, PART)]
    value, grads = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *found)

    def along(own):  # its gradient is Σ_text E[∂ loss/∂ scores] ∂ scores/∂ params
        products = jax.tree.map(lambda a, b: (a * jnp.float32(b)).sum(), scores_of(own), grads)
        return sum(jax.tree.leaves(products))

    return float(value), jax.jit(jax.grad(along))(params["self"])


def experience(
    outputs: Outputs,
    reward: np.ndarray,
    *,
    logp: Float[np.ndarray, "n t"],
    ref_logp: Float[np.ndarray, "n t"] | None = None,
    value: Float[np.ndarray, "n t"] | None = None,
    temperature: float = 1.0,
) -> Experience:
    """All outputs of one prompt as experience of n rows, whose advantages are still to be filled.

    `logp` is the policy's, from `token_logp` at the same temperature; the sampler, the trainer and,
    unless `ref_logp` is given, the reference agree on it. The reward is [n] or [n, t], as it is:
    a KL penalty on it is subtracted beforehand, `rewards.minus_kl`.
    """
    batch, n = outputs.batch(temperature), len(outputs)
    zero = np.zeros(outputs.mask.shape)
    logp, reference, value, earned = (
        jnp.asarray(zero if x is None else x, jnp.float32)
        for x in (
            logp,
            logp if ref_logp is None else ref_logp,
            value,
            token_rewards(reward, outputs),
        )
    )
    ids = jnp.zeros((n,), jnp.int32)
    nothing = jnp.zeros_like(logp)  # advantage and target for now; what no environment paid
    fields = dict.fromkeys(Experience.__dataclass_fields__, nothing) | {
        "tokens": batch.tokens,
        "mask": batch.mask,
        "segments": batch.segments,
        "logp": logp,
        "behaviour_logp": logp,
        "temperature": batch.temperature,
        "ended": jnp.ones((n,), bool),
        "prompt_id": ids,
        "sample_id": ids,
        "steps": ids,
        "old_logp": logp,
        "ref_logp": reference,
        "value": value,
        "reward": earned,
        "group_tokens": batch.mask.sum(axis=1).astype(jnp.float32),  # of a group of one
    }
    return Experience(**fields)


def gradient_of(
    function: Callable[[Float[Array, "n"]], Float[Array, ""]],
    params: Params,
    outputs: Outputs,
    *,
    model: Any,
    temperature: float = 1.0,
) -> tuple[float, Params]:
    """A function of the texts' log-probabilities `[n]`, and its exact gradient by the weights.

    The truth to compare `expected_gradient` with: E[R] is `lambda logp: (jnp.exp(logp) * R).sum()`.
    """
    batch = outputs.batch(temperature)

    def value(params):
        logp = batch_logp(params, batch, model=model, alphabet=outputs.alphabet)
        return function(logp.sum(axis=1))

    found, grads = jax.jit(jax.value_and_grad(value))(params)
    return float(found), grads


def gradient_flow(
    p: Float[np.ndarray, "n"],
    reward: Float[np.ndarray, "n"],
    times: Sequence[float],
    *,
    beta: float = 0.0,
) -> Float[np.ndarray, "times n"]:
    """A softmax policy π = softmax θ on its exact path dθ/dt = ∇_θ (E[R] − β KL(π‖p)) from p.

    dθᵢ/dt = πᵢ (fᵢ − E f), f = R − β log(π/p) (Agarwal et al. 2021, lemma C.1). At β = 0 texts of
    equal reward keep e^{−θᵢ} − e^{−θⱼ}: the likelier one takes all. The natural gradient keeps
    their ratio instead; its path is `tilted(p, reward, beta=1 / t)`.
    """
    p = distribution(p)
    reward, times = np.asarray(reward, np.float64), np.asarray(times, np.float64)
    if not (p > 0).all() or reward.shape != p.shape:
        raise ValueError(f"needs p > 0 everywhere and a reward of shape [{len(p)}]")
    if len(times) == 0 or times[0] < 0 or not (np.diff(times) > 0).all():
        raise ValueError(f"times {times.tolist()} must ascend from 0 or later")

    def speed(_, theta):
        log_pi = log_softmax(theta)
        gain = reward - beta * (log_pi - np.log(p))
        return np.exp(log_pi) * (gain - np.exp(log_pi) @ gain)

    found = solve_ivp(
        speed, (0.0, times[-1]), np.log(p), t_eval=times, method="LSODA", rtol=1e-10, atol=1e-12
    )
    if not found.success:
        raise ValueError(f"the flow could not be followed to {times[-1]}: {found.message}")
    return softmax(found.y.T, axis=1)


def _group_tokens(batch):
    """Masked tokens of all rows of a row's prompt, as `collect` counts them."""
    same = batch.prompt_id[:, None] == batch.prompt_id[None, :]
    return jnp.where(same, batch.mask.sum(axis=1)[None, :], 0).sum(axis=1).astype(jnp.float32)


def _trainer_value(terms):
    """Σ over the terms of scale · Σ where(weight ≠ 0, loss · weight, 0) / Σ count."""
    total = jnp.float32(0.0)
    for term in terms.values() if isinstance(terms, dict) else (terms,):
        count = jnp.sum(term.weight if term.count is None else term.count)
        summed = masked.sum(term.loss * term.weight, term.weight != 0)
        total += term.scale * summed / jnp.where(count == 0, 1.0, count)
    return total
