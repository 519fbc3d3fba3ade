"""Who deserves the credit: advantages and value targets from token rewards.

Every function here is `(reward, value, mask, prompt_id, *, hyperparameters) -> (advantage, target)`
with `[b, t]` arrays, float32, 0 outside the mask; a config passes one, e.g.
`partial(whitened, advantage=partial(gae, trace=0.95))`. `value` is 0 everywhere when there is no
critic; `prompt_id` names the group a row belongs to and only the group-relative ones need it.
`target` is what a critic should predict, always before whitening.

A hole in the mask (a tool's answer, a forced token) is stepped over: no time passes there, and the
advantage and value of the next chosen token reach the one before the hole unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import masked


def gae(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = δ + γλA′, δ = r + γV′ − V; target = A + V (Schulman et al. 2016, eq. 11, 12, 16).

    V′ and A′ belong to the row's next masked token, both 0 after its last: a cut-off text ends.
    """
    del prompt_id
    reward, value = masked.select(reward, mask), masked.select(value, mask)

    def step(later, now):
        next_advantage, next_value = later
        r, v, here = now
        delta = r + discount * next_value - v
        advantage = jnp.where(here, delta + discount * trace * next_advantage, next_advantage)
        return (advantage, jnp.where(here, v, next_value)), advantage

    zero = jnp.zeros(reward.shape[0], reward.dtype)
    _, advantage = jax.lax.scan(step, (zero, zero), (reward.T, value.T, mask.T), reverse=True)
    advantage = masked.select(advantage.T, mask)
    return advantage, advantage + value


def reward_to_go(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    discount: float = 1.0,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = G − V, G = r + γG′; target = G: Monte Carlo, which is GAE at trace 1."""
    return gae(reward, value, mask, prompt_id, discount=discount, trace=1.0)


def credit_horizon(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    horizon: int,
    discount: float = 1.0,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = G − V, G = Σ_{k<h} γᵏ r of the token and the h − 1 chosen after it; target = G.

    Nothing is bootstrapped: reward beyond the horizon does not exist, and with reward at the end
    only the last h tokens learn from it. A KL penalty in the reward is cut off in the same way; one
    that is a loss (`reference_kl`, `sampled_kl` with k2) stays with its own token, for every h.
    """
    del prompt_id
    if horizon < 1:
        raise ValueError(f"horizon={horizon}: at least 1, the token itself")
    # Tokens in use to the front, in order, so that "the next k" are neighbours.
    order = jnp.argsort(~mask, axis=1, stable=True)
    packed = jnp.take_along_axis(masked.select(reward, mask), order, axis=1)
    width = mask.shape[1]

    def add(k, total):
        later = jnp.where(jnp.arange(width) + k < width, jnp.roll(packed, -k, axis=1), 0.0)
        return total + discount**k * later

    packed_return = jax.lax.fori_loop(0, min(horizon, width), add, jnp.zeros_like(packed))
    target = jnp.take_along_axis(packed_return, jnp.argsort(order, axis=1), axis=1)
    target = masked.select(target, mask)
    return target - masked.select(value, mask), target


def group_relative(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"],
    *,
    normalise: bool = True,
    epsilon: float = 1e-4,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = (R − mean) / (std + ε) of the prompt's samples, on every token (GRPO: Shao et al. 2024).

    R is the row's summed reward; the deviation is the biased one; `normalise=False` does not divide
    (Dr. GRPO: Liu et al. 2025). The mean holds the sample itself, so that n samples give (n − 1)/n
    of the gradient, and dividing by std weighs prompts by how sure they are: see `leave_one_out`.
    A prompt whose samples all earn the same teaches nothing: exactly 0. The critic's value plays no
    part; target = reward to go.
    """
    advance, same, size = _against_group(reward, mask, prompt_id)
    centred = advance / size
    if not normalise:
        return _on_every_token(centred, reward, mask)
    spread = jnp.sqrt(jnp.sum(jnp.where(same, centred[None, :] ** 2, 0.0), axis=1) / size)
    return _on_every_token(centred / (spread + epsilon), reward, mask)


def leave_one_out(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = R − mean of the prompt's other samples, on every token (RLOO: Ahmadian et al. 2024).

    R is the row's summed reward. A sample without siblings has no baseline and gets 0. The critic's
    value plays no part; target = reward to go.
    """
    advance, _, size = _against_group(reward, mask, prompt_id)
    return _on_every_token(advance / jnp.maximum(size - 1, 1), reward, mask)


def batch_mean(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    own: bool = True,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """A = R − mean of the whole batch, on every token; `own=False` leaves the sample itself out.

    R is the row's summed reward. With the own sample, B rows give (B − 1)/B of the gradient. The
    critic's value plays no part; target = reward to go.
    """
    del prompt_id
    advance, _, size = _against_group(reward, mask, jnp.zeros(mask.shape[0], jnp.int32))
    return _on_every_token(advance / (size if own else jnp.maximum(size - 1, 1)), reward, mask)


def whitened(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    advantage: Callable,
    shift_mean: bool = True,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Another function's advantages with mean 0 and variance 1 over the batch; its own targets."""
    raw, target = advantage(reward=reward, value=value, mask=mask, prompt_id=prompt_id)
    return masked.whiten(raw, mask, shift_mean=shift_mean), target


def centred(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    advantage: Callable,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Another function's advantages less the batch's mean at the same position; its own targets.

    A baseline for each position where no critic is: with a reward per token, what is still to come
    falls along the text whatever was said.
    """
    found, target = advantage(reward=reward, value=value, mask=mask, prompt_id=prompt_id)
    return masked.select(found - masked.mean(found, mask, axis=0)[None], mask), target


def free_play(
    reward: Float[Array, "b t"],
    value: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_id: Int[Array, "b"] | None = None,
    *,
    advantage: Callable,
    tokens: int,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Another function's advantages, 0 on a row's first `tokens` chosen ones; its own targets.

    Free play by stopped gradients: those tokens are never reinforced, whatever they earned, so the
    policy plays as it did before training and learns to use what it finds; a critic still learns
    there. It goes outside of `whitened`, which would move a 0. A KL or an entropy in the loss still
    acts on them. `rewards.free_play` only stops the pay.
    """
    found, target = advantage(reward=reward, value=value, mask=mask, prompt_id=prompt_id)
    return masked.select(found, mask & ~masked.is_first(mask, tokens)), target


def _against_group(reward, mask, prompt_id):
    """Σ_j (R_i − R_j) over the rows j of the same prompt [b], who they are [b, b], how many [b].

    Rows may stand in any order; a row without tokens belongs to no group. Differences, not a mean
    to subtract: rounding would otherwise turn equal rewards into noise that ÷ std makes large.
    Select and sum, not a matrix product, which accelerators would do in bfloat16.
    """
    total, present = masked.sum(reward, mask, axis=1), mask.any(axis=1)
    same = prompt_id[:, None] == prompt_id[None, :]
    same = same & present[:, None] & present[None, :]
    advance = jnp.sum(jnp.where(same, total[:, None] - total[None, :], 0.0), axis=1)
    return advance, same, jnp.maximum(jnp.sum(same, axis=1), 1).astype(total.dtype)


def _on_every_token(advantage, reward, mask):
    _, target = reward_to_go(reward, jnp.zeros_like(reward), mask)
    return masked.select(jnp.broadcast_to(advantage[:, None], mask.shape), mask), target
