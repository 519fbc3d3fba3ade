"""Comparisons made while training: which samples are shown, who is asked, what is answered.

With these in `Config.derived`, a reward model learns in the same loop as the policy that it pays:

    derived={"comparisons": Derived(partial(compare, oracle=gold, temperature=0.5))}
    learners={..., "reward": Learner(SCALAR, reward_model, batch="comparisons")}

Offline training is `batch="pairs"`, a stream; a mixture is a `Derived(joined, ("pairs",
"comparisons"))`; how often people are asked is the learner's `when`, since a batch that no learner
wants at a step is not made. The oracle is any reward: a model, or `from_text` for a function of the
text, or a program that waits for a person (then wrap `compare` in `on_host`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import masked, rewards
from rlhf_jax.acquisition import top
from rlhf_jax.types import Pairs, Params, Rollout

WHO, WHAT, WRONG = range(3)  # folded into the key: ties, answers, mistakes


def compare(
    rollout: Rollout,
    *,
    params: Mapping[str, Params],
    key: Array,
    oracle: Callable,
    k: int = 2,
    temperature: float = 0.0,
    flip: float = 0.0,
    acquire: Callable | None = None,
    ask: int | None = None,
) -> Pairs:
    """Groups of k samples of one prompt, first the one that the oracle prefers; for Config.derived.

    `oracle(rollout, params) -> [b, t]` is a reward: a text's worth w is the sum of its. Member i is
    preferred with probability softmax(w/T)ᵢ, Bradley–Terry for two (Plackett–Luce's first choice
    for more; Ziegler et al. 2019 ask for the best of 4); T = 0 prefers the best, ties at random.
    Then a share `flip` of the answers names one of the others. With `acquire(pairs, params) -> [n]`
    (of the unlabelled groups; `ensemble_scores` makes one), only the `ask` groups of the highest
    number are shown to the oracle. A group that mixes prompts (k must divide the samples per
    prompt), or of which a worth is not finite, has no masked token, hence no weight.

    Raises:
        ValueError: for rows that are no multiple of k, or arguments out of range.
    """
    if getattr(oracle, "on_host", False) and isinstance(rollout.tokens, jax.core.Tracer):
        raise ValueError(
            "this oracle runs on the host: write labelling.on_host(partial(compare, oracle=...))"
        )
    if not (temperature >= 0 and 0 <= flip <= 1):
        raise ValueError(f"temperature={temperature}, flip={flip}: needs ≥ 0, and between 0 and 1")
    if (acquire is None) != (ask is None):
        raise ValueError("acquire and ask go together: by what, and how many groups are shown")
    rows, one_prompt = _groups(rollout, k)
    if acquire is not None:
        if not 1 <= ask <= rows.shape[0]:
            raise ValueError(f"ask={ask}: of {rows.shape[0]} groups, from 1 to all")
        shown = top(acquire(_pairs(rollout, rows, one_prompt), params), ask)
        rows, one_prompt = rows[shown], one_prompt[shown]
    asked = jax.tree.map(lambda x: x[rows.reshape(-1)], rollout)
    worth = masked.sum(oracle(asked, params), asked.mask, axis=1).reshape(rows.shape)
    first = choose(worth, key, temperature=temperature, flip=flip)
    order = jnp.argsort(jnp.arange(k)[None] != first[:, None], axis=1, stable=True)
    rows = jnp.take_along_axis(rows, order, axis=1)
    return _pairs(rollout, rows, one_prompt & jnp.isfinite(worth).all(axis=1))


def choose(
    worth: Float[Array, "n k"], key: Array, *, temperature: float = 0.0, flip: float = 0.0
) -> Int[Array, "n"]:
    """Who is preferred: i with probability softmax(worth/T)ᵢ, but another in a share `flip`.

    T = 0 is the highest worth, ties at random.
    """
    n, k = worth.shape
    if temperature > 0:
        gumbel = jax.random.gumbel(jax.random.fold_in(key, WHAT), (n, k))
        worth = worth / temperature + gumbel
    tie = jax.random.uniform(jax.random.fold_in(key, WHO), (n, k))
    best = jnp.argmax(jnp.where(worth == worth.max(axis=1, keepdims=True), tie, -1.0), axis=1)
    wrong = jax.random.fold_in(key, WRONG)
    mistaken = jax.random.bernoulli(wrong, flip, (n,))
    step = jax.random.randint(jax.random.fold_in(wrong, 1), (n,), 1, k)
    return jnp.where(mistaken, (best + step) % k, best)


@dataclass(frozen=True)
class on_host:
    """`make(*batches, params, key)` outside compiled programs: for an oracle that reads texts.

    `on_host(partial(compare, oracle=from_text(score, tokenizer=...)))`: the pool, the time-outs and
    the errors are `from_text`'s. One process must see all rows.
    """

    make: Callable

    on_host: ClassVar[bool] = True

    def __call__(self, *batches, params: Mapping[str, Params], key: Array):
        """As `make`."""
        return self.make(*batches, params=params, key=key)


def joined(*batches: Pairs, params: Mapping[str, Params], key: Array) -> Pairs:
    """All groups of all batches, padded on the right to one width; for `Config.derived`."""
    del params, key
    members = {batch.tokens.shape[1] for batch in batches}
    if len(members) > 1:
        raise ValueError(f"comparisons of {sorted(members)} members cannot be joined; use one k")
    width = max(batch.tokens.shape[2] for batch in batches)

    def one(name):
        found = [getattr(batch, name) for batch in batches]
        wide = [jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]))) for x in found]
        return jnp.concatenate(wide)

    return Pairs(tokens=one("tokens"), mask=one("mask"), segments=one("segments"))


def ensemble_scores(
    pairs: Pairs,
    params: Mapping[str, Params],
    *,
    model: Any,
    learners: tuple[str, ...],
    measure: Callable,
) -> Float[Array, "n"]:
    """`measure(scores [m, n, k])` of what m reward models say of each text; an `acquire`.

    `partial(ensemble_scores, model=SCALAR, learners=("reward_0", "reward_1"),
    measure=acquisition.variance)`, with the same names in `Derived.models`. A group with an empty
    member comes last.
    """
    n, k, t = pairs.tokens.shape
    flat = jax.tree.map(lambda x: x.reshape(n * k, t), pairs)
    scores = rewards.opinions(flat, params, model=model, learners=learners).reshape(-1, n, k)
    return jnp.where(pairs.mask.any(axis=2).all(axis=1), measure(scores), -jnp.inf)


def resampled(batch: Pairs, key: Array) -> Pairs:
    """As many groups, drawn with replacement: the bootstrap, for an ensemble on fresh comparisons.

    A learner's `transform`: each learner has its own key. For data that is met again and again,
    where every model would in the end see all of it, use `half`.
    """
    n = batch.tokens.shape[0]
    return jax.tree.map(lambda x: x[jax.random.randint(key, (n,), 0, n)], batch)


def half(batch: Pairs, key: Array, *, member: int, share: float = 0.5) -> Pairs:
    """The groups that belong to one member of an ensemble; the others' mask becomes False.

    Which those are, `member` and the texts decide, in whatever order or step they come: a bootstrap
    of the whole data set, however often it is read (double or nothing: Owen & Eckles 2012). A
    `share` of 1/2 has the variance of drawing with replacement.
    """
    del key
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: of the groups, above 0 and at most 1")
    tokens = jnp.where(batch.segments > 0, batch.tokens + 1, 0).astype(jnp.uint32)
    place = _mixed(jax.lax.broadcasted_iota(jnp.uint32, tokens.shape, 2))
    text = jnp.where(tokens > 0, _mixed(tokens + place), 0).sum(-1)
    # A sum over members: the same comparison with its label flipped is the same comparison.
    name = _mixed(text).sum(-1)
    seed = jax.random.key(member)
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(seed, i)))(name)
    return batch.replace(mask=batch.mask & (draw < share)[:, None, None])


def _mixed(x):
    """A one-to-one scrambling of 32 bits, in which every bit of `x` reaches every bit."""
    for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(odd)
    return x ^ (x >> 16)


def _groups(rollout, k) -> tuple[Int[Array, "n k"], Bool[Array, "n"]]:
    """Rows of each group, and whether they are samples of one prompt."""
    b = rollout.tokens.shape[0]
    if k < 2 or b % k:
        raise ValueError(
            f"comparisons of k={k} do not divide {b} samples; k is at least 2, and "
            "rollouts.samples a multiple of it"
        )
    rows = jnp.argsort(rollout.prompt_id, stable=True).reshape(-1, k)
    prompt = rollout.prompt_id[rows]
    return rows, (prompt == prompt[:, :1]).all(axis=1)


def _pairs(rollout, rows, valid):
    mask = rollout.mask[rows] & valid[:, None, None]
    return Pairs(tokens=rollout.tokens[rows], mask=mask, segments=rollout.segments[rows])
