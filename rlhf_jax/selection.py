"""Which rows and tokens are learned from: texts that scored enough, the best samples, a mixture.

Transforms of batches, so that any objective follows: `mle` on the best of n is best-of-n distilled,
and in a loop with fresh samples it is expert iteration (Anthony et al. 2017), k rounds of which
make the best of nᵏ. Those of `(batch, key)` are a learner's `transform`: they clear the mask of
what is left out, so shapes stay what they are and the trainer divides by what remains. Those that
take `params` are for `Config.derived`, with their hyperparameters bound by `partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import masked
from rlhf_jax.conditioning import boundaries
from rlhf_jax.types import Experience, Labeled, Params, Rollout, Sequences


def total_reward(batch: Experience) -> Float[Array, "b"]:
    """Σ reward of each row, as collected: a KL penalty included; `reference=None` has none."""
    return masked.sum(batch.reward, batch.mask, axis=1)


def best_of(
    batch: Rollout, key: Array, *, n: int, keep: int = 1, by: Callable = total_reward
) -> Rollout:
    """Of every n samples of a prompt the best `keep` stay; the mask of the others becomes False.

    `by(batch) -> [b]` says how good rows are; ties are broken at random. A row that stays is of a
    level with probability F(level)ⁿ − F(level⁻)ⁿ, F the distribution function of one sample, and
    within the level it is as the sampler has it (Beirami et al. 2024, lemma 1, where nothing ties).
    n may divide the samples of a prompt: each n of them then have a best. Where they are fewer, or
    no multiple of n, prompts get mixed up, and n rows of more than one prompt are masked out.
    """
    best, whole = _best(batch, key, n, keep, by)
    stays = jnp.zeros(batch.tokens.shape[:1], bool).at[best].set(whole)
    return batch.replace(mask=batch.mask & stays[:, None])


def best_rows(
    batch: Rollout,
    *,
    params: Mapping[str, Params],
    key: Array,
    n: int,
    keep: int = 1,
    by: Callable = total_reward,
) -> Rollout:
    """`best_of` for `Config.derived`: the rows that stay and no others, [b · keep / n].

    Nothing is computed for the losers.
    """
    del params
    best, whole = _best(batch, key, n, keep, by)
    found = jax.tree.map(lambda x: x[best], batch)
    return found.replace(mask=found.mask & whole[:, None])


def _best(batch, key, n, keep, by) -> tuple[Int[Array, "m"], Bool[Array, "m"]]:
    """Rows that win, and whether the n rows that each was drawn with are of one prompt."""
    rows = batch.tokens.shape[0]
    if not 1 <= keep <= n or rows % n:
        raise ValueError(
            f"the best {keep} of {n}: needs 1 ≤ keep ≤ n, and n must divide the {rows} rows; give "
            "rollouts.samples a multiple of n"
        )
    group = jnp.argsort(batch.prompt_id, stable=True).reshape(-1, n)
    good = jnp.where(batch.mask.any(axis=1), by(batch), -jnp.inf)[group]
    place = jnp.lexsort((jax.random.uniform(key, group.shape), -good), axis=-1)[:, :keep]
    prompt = batch.prompt_id[group]
    whole = (prompt == prompt[:, :1]).all(axis=1, keepdims=True)
    best = jnp.take_along_axis(group, place, axis=1)
    return best.reshape(-1), jnp.broadcast_to(whole, best.shape).reshape(-1)


def above(batch: Labeled, key: jax.Array | None = None, *, threshold: float) -> Labeled:
    """Only texts whose score is `threshold` or more: filtered fine-tuning."""
    del key
    return _only(batch, batch.score >= threshold)


def best_share(batch: Labeled, key: jax.Array | None = None, *, share: float) -> Labeled:
    """Only the best `share` of the batch's texts, by score (expert iteration: Anthony et al. 2017).

    Equal scores stay or go together, so the share is the nearest one possible, at least one text.
    """
    del key
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: above 0, and 1 keeps every text")
    if share == 1:
        return batch
    return _only(batch, batch.score >= _share_edge(batch, share))


def informative(
    batch: Experience, key: jax.Array | None = None, *, tolerance: float = 0.0
) -> Experience:
    """Only prompts whose samples did not all earn the same (DAPO: Yu et al. 2025, §3.2).

    The others have advantage 0 under a group's baseline and would only enlarge the denominator.
    What a sample earned is the sum of `reward`: with a KL penalty in it no two are equal, so charge
    KL as a loss, or allow a `tolerance`. A prompt with one sample goes too.
    Departs: nothing is sampled to replace them; the batch has fewer tokens.
    """
    del key
    earned, present = total_reward(batch), batch.mask.any(axis=1)
    same = (batch.prompt_id[:, None] == batch.prompt_id[None]) & present[None]
    most = jnp.max(jnp.where(same, earned[None], -jnp.inf), axis=1)
    least = jnp.min(jnp.where(same, earned[None], jnp.inf), axis=1)
    return _only(batch, most - least > tolerance)


def _share_edge(batch, share):
    """The score at which the best `share` of a batch's texts begin."""
    below = jnp.array([1.0 - share], jnp.float32)
    score, present = batch.score.astype(jnp.float32), batch.mask.any(axis=1)
    return boundaries(score, present, below, least=True)[0]


def _only(batch: Sequences, keep: Bool[Array, "b"]) -> Sequences:
    return batch.replace(mask=batch.mask & keep[:, None])


def one_position(batch: Sequences, key: Array) -> Sequences:
    """Of each row's masked tokens one stays, drawn uniformly (Silver et al. 2016, value network).

    The states of one game are nearly alike and share their outcome: a critic that sees them all
    learns the games by heart. Rows hold one text each.
    """
    draw = jnp.where(batch.mask, jax.random.uniform(key, batch.mask.shape), -1.0)
    drawn = jnp.arange(batch.mask.shape[1])[None] == jnp.argmax(draw, axis=1)[:, None]
    return batch.replace(mask=batch.mask & drawn)


def mixture(
    first: Sequences,
    second: Sequences,
    *,
    params: Mapping[str, Params],
    key: Array,
    fraction: float,
) -> Sequences:
    """Each row is the second batch's with probability `fraction`, otherwise the first's.

    With texts first and the student's rollouts second, `fraction` is λ, the share of its own data
    that a student is taught on (Agarwal et al. 2024, algorithm 1; there whole batches are chosen).
    What is left has the fields that both batches have: texts and experience become `Sequences`,
    whose log-probabilities are taken at temperature 1.
    """
    del params
    rows = first.tokens.shape[0]
    if second.tokens.shape[0] != rows:
        raise ValueError(
            f"a mixture takes each row from one of two batches of equal size, not {rows} and "
            f"{second.tokens.shape[0]} rows; give both streams the same number"
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}: the second batch's share, between 0 and 1")
    first, second = alike(first, second)
    takes = jax.random.bernoulli(key, fraction, (rows,))

    def choose(a, b):
        return jnp.where(takes.reshape(-1, *[1] * (a.ndim - 1)), b, a.astype(b.dtype))

    return jax.tree.map(choose, first, second)


def with_score(
    batch: Experience,
    *,
    params: Mapping[str, Params],
    key: Array,
    by: Callable = total_reward,
) -> Labeled:
    """Rollouts as texts with feedback: the score is `by(batch)`, a token's score its reward.

    What objectives of texts learn from, and conditioning, on the policy's own samples. They are
    scored at temperature 1, whatever they were drawn at.
    """
    del params, key
    mask = batch.mask
    return Labeled(batch.tokens, mask, batch.segments, by(batch), masked.select(batch.reward, mask))


def alike(*batches: Sequences) -> tuple[Sequences, ...]:
    """The batches as their nearest common class, padded on the right to one width."""
    if any(batch.tokens.ndim != 2 for batch in batches):
        raise ValueError("groups [n, k, t] cannot be put beside rows [b, t]")
    width = max(batch.tokens.shape[1] for batch in batches)
    kind = next(
        kind for kind in type(batches[0]).__mro__ if all(isinstance(x, kind) for x in batches)
    )

    def one(batch):
        shape = batch.tokens.shape

        def pad(x):
            if x.shape[:2] != shape:
                return x
            return jnp.pad(x, ((0, 0), (0, width - shape[1])) + ((0, 0),) * (x.ndim - 2))

        return kind(**{name: pad(getattr(batch, name)) for name in kind.__dataclass_fields__})

    return tuple(one(batch) for batch in batches)
