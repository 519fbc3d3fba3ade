"""Where rewards come from and what is done to them on the way to the advantages.

A reward is `(rollout, params) -> [b, t]`, float32 and 0 outside the mask. Token rewards are the
native kind; the reward of a whole text lands on its last masked token. All of this is pure but
`from_text`, the one visit to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax import hostpool, masked
from rlhf_jax.hostpool import RewardError
from rlhf_jax.types import Params, Rollout


def from_model(
    rollout: Rollout, params: Mapping[str, Params], *, model: Any, learner: str = "reward"
) -> Float[Array, "b t"]:
    """What the reward model named `learner` says after reading a row's last masked token."""
    hidden = model.apply(params[learner], rollout.tokens, segments=rollout.segments).hidden
    said = model.value(params[learner], hidden)
    return masked.select(said, masked.is_last(rollout.mask))


@dataclass(frozen=True)
class from_text:
    """`score(text) -> number` on the text of each row, in a pool of worker processes on the host.

    A row whose sample takes longer than `timeout` seconds, raises, or does not return one finite
    number stops the run with a RewardError that shows the row; nothing is replaced by 0. A row
    without a masked token has nothing to be paid for and is not scored. Workers import `score` by
    its name, never touch an accelerator, and live until the program ends.
    """

    score: Callable[[str], float]  # a function of a module: workers import it
    decode: Callable[[Sequence[int]], str] | None = None  # token ids to text
    tokenizer: str | None = None  # or the tokenizer to decode with: a tokenizer.json, or "bytes"
    prompt: bool = True  # the text is prompt and response; False: the response alone
    timeout: float = 30.0  # seconds per sample; a worker's first one pays for what `score` loads
    workers: int | None = None  # None: one per core, at most 16

    on_host: ClassVar[bool] = True

    def __post_init__(self):
        if (self.decode is None) == (self.tokenizer is None):
            raise ValueError("from_text needs decode=... or tokenizer=..., and not both")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout}: seconds per sample, above 0")

    def __call__(self, rollout: Rollout, params: Mapping[str, Params]) -> Float[Array, "b t"]:
        """Rewards of all rows, which this process must be able to see; `params` plays no part."""
        mask = np.asarray(rollout.mask)
        used = np.asarray(rollout.segments) > 0 if self.prompt else mask
        rows = np.flatnonzero(mask.any(axis=1))
        decode = self._decode()
        texts = [decode(ids[keep].tolist()) for ids, keep in zip(
            np.asarray(rollout.tokens)[rows], used[rows], strict=True
        )]  # fmt: skip
        pool = hostpool.shared(self.score, self.workers)
        score = np.zeros(mask.shape[0], np.float32)
        score[rows] = pool.map(texts, timeout=self.timeout, names=rows.tolist())
        return masked.at_last(jnp.asarray(score), jnp.asarray(mask))

    def _decode(self):
        if self.decode is not None:
            return self.decode
        from rlhf_jax.data import tokenizers  # here: a reward on the device needs no tokenizer

        return tokenizers.load(self.tokenizer).decode


def check(
    reward: Float[Array, "b t"],
    rollout: Rollout,
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> None:
    """Look at a reward on the host before it is learned from.

    Raises:
        RewardError: naming the first row whose reward is not finite, or is not 0 outside the mask;
            or the shape or dtype, if they are wrong.
    """
    reward, mask = np.asarray(reward), np.asarray(rollout.mask)
    if reward.shape != mask.shape or reward.dtype != np.float32:
        raise RewardError(
            f"a reward is float32 of the rollout's shape {list(mask.shape)}, zero outside its mask;"
            f" this one is {reward.dtype} {list(reward.shape)}. To put one number per text on its "
            "last token, use rlhf_jax.masked.at_last(score, rollout.mask)"
        )
    for wrong, what in (
        (~np.isfinite(reward), "is not finite"),
        (~mask & (reward != 0), "is not 0 outside the mask"),
    ):
        if wrong.any():
            row, at = (int(i) for i in np.argwhere(wrong)[0])
            ids = np.asarray(rollout.tokens)[row][np.asarray(rollout.segments)[row] > 0].tolist()
            shown = repr(decode(ids)) if decode is not None else f"tokens {ids}"
            raise RewardError(
                f"the reward of row {row} {what} at token {at}: {reward[row, at]} "
                f"({int(wrong.any(axis=1).sum())} such rows)\n  {shown}"
            )


@dataclass(frozen=True)
class KL:
    """The price of drifting from the reference (defaults: Ziegler et al. 2019)."""

    initial: float = 0.15  # β, reward per nat
    adaptive: bool = True
    target: float = 6.0  # nats per sample
    horizon: int = 10_000  # samples


def minus_kl(
    reward: Float[Array, "b t"],
    logp: Float[Array, "b t"],
    ref_logp: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    coefficient: float | Float[Array, ""],
) -> Float[Array, "b t"]:
    """Reward − β (log π − log π_ref) per token (Ziegler et al. 2019, eq. 2)."""
    gap = k1(masked.select(logp, mask), masked.select(ref_logp, mask))
    return masked.select(reward, mask) - coefficient * gap


def k1(logp: Array, ref_logp: Array) -> Array:
    """Log-ratio d = log π − log π_ref, nats: unbiased for KL(π‖π_ref) on samples of π."""
    return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
    """½ d², nats: never negative, biased, little variance (Schulman 2020)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Array, ref_logp: Array) -> Array:
    """e^{−d} − 1 + d, nats: never negative, unbiased (Schulman 2020). Departs: |d| ≤ 20."""
    d = jnp.clip(logp - ref_logp, -20.0, 20.0)
    return jnp.expm1(-d) + d


def adaptive_kl(
    coefficient: float | Float[Array, ""],
    kl: float | Float[Array, ""],
    samples: int,
    *,
    target: float = 6.0,
    horizon: int = 10_000,
) -> Float[Array, ""]:
    """β (1 + clip(KL/target − 1, ±0.2) · samples/horizon), KL in nats per sample (Ziegler §2.2)."""
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient * (1.0 + error * samples / horizon), jnp.float32)


def missing_eos(
    reward: Float[Array, "b t"], rollout: Rollout, *, penalty: float
) -> Float[Array, "b t"]:
    """Takes `penalty` from the last token of a text that was cut off before it ended."""
    lost = jnp.where(rollout.ended, 0.0, penalty)
    return reward - masked.at_last(lost, rollout.mask)


def length_penalty(
    reward: Float[Array, "b t"], rollout: Rollout, *, coefficient: float, target: int = 0
) -> Float[Array, "b t"]:
    """Takes coefficient · max(tokens − target, 0) from the last token; tokens of the mask."""
    excess = jnp.maximum(rollout.mask.sum(axis=1) - target, 0)
    return reward - masked.at_last(coefficient * excess, rollout.mask)


def normalise(
    reward: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    mean: float | Float[Array, ""],
    std: float | Float[Array, ""],
) -> Float[Array, "b t"]:
    """Rewards whose sum over a text is (Σ r − mean) / std: the shift falls on the last token."""
    shift = masked.at_last(jnp.broadcast_to(jnp.asarray(mean), mask.shape[:1]), mask)
    return (masked.select(reward, mask) - shift) / std
