"""Where rewards come from and what is done to them on the way to the advantages.

A reward is `(rollout, params) -> [b, t]`, float32 and 0 outside the mask. Token rewards are the
native kind; the reward of a whole text lands on its last masked token. All of this is pure but
`from_text`, the one visit to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax import hostpool, masked
from rlhf_jax.hostpool import RewardError
from rlhf_jax.ratios import k1
from rlhf_jax.types import Params, Rollout, Sequences


def at_end(score: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """The last masked token is paid the score of the whole text."""
    return masked.select(score, masked.is_last(mask))


def each_prefix(score: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Every token is paid the score of the text up to it (ScratchGAN: d'Autume et al. 2019).

    Dense, and another problem than `at_end`: early tokens are judged in every prefix after them.
    """
    return masked.select(score, mask)


def gains(score: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Every token is paid what it added to the score: dense, and the sum is that of `at_end`.

    The score is a potential (Ng et al. 1999), 0 before the first masked token; with logits of a
    perfect discriminator of prefixes a token earns log p(token|prefix) − log q(token|prefix).
    """
    score = masked.select(score, mask)
    # The masked token before each one; index 0 for none, which is never masked: its score is 0.
    latest = jax.lax.cummax(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)
    before = jnp.concatenate([jnp.zeros_like(latest[:, :1]), latest[:, :-1]], axis=1)
    return masked.select(score - jnp.take_along_axis(score, before, axis=1), mask)


def from_model(
    rollout: Rollout,
    params: Mapping[str, Params],
    *,
    model: Any,
    learner: str = "reward",
    paid: Callable = at_end,
) -> Float[Array, "b t"]:
    """What the reward model named `learner` says after reading a row's last masked token.

    `paid=each_prefix` pays every token what the model says after it: a reward model of tokens.
    """
    hidden = model.apply(params[learner], rollout.tokens, segments=rollout.segments).hidden
    return paid(model.value(params[learner], hidden), rollout.mask)


def opinions(
    batch: Sequences, params: Mapping[str, Params], *, model: Any, learners: tuple[str, ...]
) -> Float[Array, "m b"]:
    """What each of several reward models says of each text, after its last masked token."""
    said = [from_model(batch, params, model=model, learner=name).sum(axis=1) for name in learners]
    return jnp.stack(said)


def ensemble(
    rollout: Rollout,
    params: Mapping[str, Params],
    *,
    model: Any,
    learners: tuple[str, ...],
    pessimism: float = 0.0,
) -> Float[Array, "b t"]:
    """Mean − pessimism · std over reward models, on the last masked token.

    A model is overrated where it errs, and several err apart (Coste et al. 2023; they take the
    variance off, or the minimum). The std is biased (divided by m). Members are learners like any
    other: each has its own first weights, and `labelling.resampled` or `half` its own bootstrap.
    `disagreement` is the std by itself. Comparisons leave each model's origin and scale free:
    `reward_model(centre=...)` holds the first.
    """
    said = opinions(rollout, params, model=model, learners=learners)
    return masked.at_last(said.mean(axis=0) - pessimism * said.std(axis=0), rollout.mask)


def disagreement(
    rollout: Rollout, params: Mapping[str, Params], *, model: Any, learners: tuple[str, ...]
) -> Float[Array, "b t"]:
    """Std over reward models, on the last masked token: a measure, or a reward for being novel."""
    said = opinions(rollout, params, model=model, learners=learners)
    return masked.at_last(said.std(axis=0), rollout.mask)


def from_environment(rollout: Rollout, params: Mapping[str, Params]) -> Float[Array, "b t"]:
    """What the rollout's environment paid, on the tokens that it paid for; `params` plays no part.

    Of other rewards too: a plain function that adds them.
    """
    return rollout.earned


@dataclass(frozen=True)
class from_text:
    """`score(text) -> number` on the text of each row, in a pool of worker processes on the host.

    A row whose sample takes longer than `timeout` seconds, raises, or does not return one finite
    number stops the run with a RewardError that shows the row; nothing is replaced by 0. A row
    without a masked token has nothing to be paid for and is not scored. Workers import `score` by
    its name, never touch an accelerator, and live until the program ends.

    With `dense`, each token is paid what it changed: Φ(text up to the next masked token) − Φ(text
    up to this one), the score as a potential (Ng et al. 1999, eq. 2, with discount 1). Departs: Φ
    is 0 before the first masked token, so that a row's rewards add up to the score of its whole
    text, as without `dense` (up to rounding: about 1e-7 · max |Φ| per token). What an environment
    adds belongs to the token that it answers. Prefixes may end inside a word, which is scored as it
    stands; a score that only makes sense of finished texts is a poor potential. Costs one call of
    `score` for each token that changes the text.

    With `by_prompt` it is `score(text, prompt_id)`, for answers that are right or wrong by what was
    asked: the id is the prompt's place in its stream, whatever the batch, the process or a resume.
    """

    score: Callable[..., float]  # a function of a module: workers import it
    decode: Callable[[Sequence[int]], str] | None = None  # token ids to text
    tokenizer: str | None = None  # or the tokenizer to decode with: a tokenizer.json, or "bytes"
    prompt: bool = True  # the text is prompt and response; False: the response alone
    timeout: float = 30.0  # seconds per sample; a worker's first one pays for what `score` loads
    workers: int | None = None  # None: one per core, at most 16
    dense: bool = False  # pay token by token; False: the whole score on the last masked token
    by_prompt: bool = False  # the function is told which prompt the text answers, too

    on_host: ClassVar[bool] = True

    def __post_init__(self):
        if (self.decode is None) == (self.tokenizer is None):
            raise ValueError("from_text needs decode=... or tokenizer=..., and not both")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout}: seconds per sample, above 0")

    def __call__(self, rollout: Rollout, params: Mapping[str, Params]) -> Float[Array, "b t"]:
        """Rewards of all rows, which this process must be able to see; `params` plays no part."""
        mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
        used = np.asarray(rollout.segments) > 0 if self.prompt else mask
        # In numpy: an array of the device would wait behind what the device does meanwhile.
        left = mask[:, ::-1].cumsum(axis=1)[:, ::-1]
        paid = mask if self.dense else mask & (left == 1)
        decode, texts = self._decode(), {}
        for row in np.flatnonzero(mask.any(axis=1)).tolist():
            at = np.flatnonzero(paid[row]).tolist()
            for start, end in zip(at, [*at[1:], mask.shape[1]], strict=True):
                texts[row, start] = decode(tokens[row, :end][used[row, :end]].tolist())
        # A token that leaves the text as it is (EOS) is not scored again.
        distinct = list(dict.fromkeys((row, text) for (row, _), text in texts.items()))
        pool, prompts = hostpool.shared(self.score, self.workers), np.asarray(rollout.prompt_id)
        found = pool.map(
            [(text, int(prompts[row])) if self.by_prompt else text for row, text in distinct],
            timeout=self.timeout,
            names=[row for row, _ in distinct],
        )
        score = dict(zip(distinct, found, strict=True))
        reward, before = np.zeros(mask.shape, np.float32), {}
        for (row, at), text in texts.items():
            reward[row, at] = score[row, text] - before.get(row, 0.0)
            before[row] = score[row, text]
        return jnp.asarray(reward)

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
    estimator: Callable = k1  # of a token's KL; k2, k3 do not have the KL's gradient as rewards
    exact: bool = False  # over the vocabulary instead; the token's own share must then be a loss


def minus_kl(
    reward: Float[Array, "b t"],
    kl: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    coefficient: float | Float[Array, ""],
) -> Float[Array, "b t"]:
    """Reward − β KL per token, where k1 estimates the KL (Ziegler et al. 2019, eq. 2).

    Whatever estimates it (`ratios.k1`, `k2`, `k3`, or the exact one), no gradient flows through it.
    """
    return masked.select(reward, mask) - coefficient * masked.select(kl, mask)


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


def max_entropy(
    reward: Float[Array, "b t"], rollout: Rollout, *, temperature: float
) -> Float[Array, "b t"]:
    """Adds −τ log π(token): maximum-entropy RL, unlike a bonus seen by earlier tokens too.

    With reward log p the optimum is p^(1/τ)/Z over whole texts (Levine 2018, §2.3); log π is the
    sampler's, in nats.
    """
    return reward - temperature * masked.select(rollout.logp, rollout.mask)


def free_play(reward: Float[Array, "b t"], rollout: Rollout, *, tokens: int) -> Float[Array, "b t"]:
    """Nothing is paid for the first `tokens` chosen tokens of a row (gwern.net/free-play).

    What comes later still teaches them: play is free, and learned. A KL penalty is taken after the
    shaping and stays. A text that ends within its free play earns nothing, a score at its end
    included. The other readings: `advantages.free_play`, `models.attention.free_play`.
    """
    return jnp.where(masked.is_first(rollout.mask, tokens), 0.0, reward)


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
