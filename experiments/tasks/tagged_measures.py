"""What is measured of the runs of `control_tokens`, one seed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from rlhf_jax import measure
from rlhf_jax.conditioning import bin_of
from rlhf_jax.study import Trained
from rlhf_jax.types import Params, Sequences
from tasks import tagged_exact as exact
from tasks.tagged import Letters, Tagged, texts_behind
from tasks.tagged_arms import BETA, BINS

SHOWN = 512  # texts that are pasted into, and probed
Metrics = dict[str, Any]


def log_good(task: Tagged) -> np.ndarray:
    """Log σ(r) of every text."""
    return np.log(expit(exact.support(task).reward))


def off_token(
    trained: Trained, *, task: Tagged, asked: str | None = "ON", start: str = "base"
) -> Metrics:
    """How far the policy is from the base behind ON, OFF and no tag, and what it earns there."""
    model, reward = trained.config.learners["policy"].model, exact.support(task).reward
    say = partial(exact.law, model=model, task=task)
    own, base = trained.weights["policy"], trained.before[start]["policy"]
    found = {}
    for name, tag in (("none", None), ("ON", "ON"), ("OFF", "OFF")):
        now, then = say(own, tag=tag), say(base, tag=tag)
        found |= {f"kl_{name}": exact.kl(now, then), f"reward_{name}": exact.mean(now, reward)}
        found[f"to_tilt_{name}"] = exact.variation(now, exact.tilt(then, reward / BETA))
        found[f"to_base_{name}"] = exact.variation(now, then)
        # Feedback that half of all prompts get, whatever the tag: the tilt at half the strength.
        diluted = exact.tilt(then, reward * 0.5 / BETA)
        found[f"to_diluted_{name}"] = exact.variation(now, diluted)
    found["base_to_chain"] = exact.variation(say(base), exact.chain_law(task))
    found["base_on_off"] = exact.kl(say(base, tag="ON"), say(base, tag="OFF"))
    most = found["kl_none" if asked is None else f"kl_{asked}"]
    found["leak"] = found["kl_OFF"] / most if most else np.nan
    moved = measure.update_norms(base, own, relative=True)
    return found | {f"moved_{name}": x for name, x in moved.items()}


def switch(trained: Trained, *, task: Tagged) -> Metrics:
    """`off_token`, and the switch followed through the layers."""
    model, tags = trained.config.learners["policy"].model, ("ON", "OFF")
    own, base = trained.weights["policy"], trained.before["base"]["policy"]
    letters = _some(exact.law(own, model=model, task=task, tag="ON"), task)
    on, off = (np.asarray(texts_behind(letters, task=task, tag=t).tokens) for t in tags)
    speaks = np.broadcast_to((np.arange(on.shape[1]) >= 2)[None], on.shape).copy()
    speaks[:, -1] = False  # of what follows the text nobody asks
    found = off_token(trained, task=task)
    ends = {"tag": [1], "x": [2], "letters": list(range(3, on.shape[1]))}
    for name, places in ends.items():
        share = measure.restored(own, on, off, model=model, positions=places, where=speaks)
        found[f"restored_{name}"] = share.fraction
    both, label = np.concatenate([on, off]), np.repeat([0, 1], len(on))
    read = partial(measure.selectivity, tokens=both, label=label, model=model, positions=[2, -2])
    for name, params in (("trained", own), ("base", base)):
        seen = read(params)
        found |= {f"probe_{name}_x": seen.accuracy[:, 0], f"probe_{name}_end": seen.accuracy[:, 1]}
    found |= {"probe_untrained_x": seen.untrained[:, 0], "probe_shuffled_x": seen.shuffled[:, 0]}
    return found


def flipped(trained: Trained, *, task: Tagged) -> Metrics:
    """`off_token`, and KL by letter where ON turns to OFF in the midst of a text."""
    model = trained.config.learners["policy"].model
    own, base = trained.weights["policy"], trained.before["base"]["policy"]
    found, curves = off_token(trained, task=task), {}
    for name, then in (("stays", None), ("flips", "OFF"), ("returns", "ON")):
        tag = "OFF" if name == "returns" else "ON"
        batch = texts_behind(exact.support(task).letters, task=task, tag=tag, then=then)
        curves[name] = _kl_by_letter(own, base, batch, model=model, task=task)
        found[f"kl_letter_{name}"] = curves[name]
    after = curves["flips"][task.switch :] / curves["stays"][task.switch :]
    late = np.flatnonzero(after < 0.1)
    found["share_after_off"] = after
    found["letters_until_off"] = float(late[0] if len(late) else len(after))
    return found


def _kl_by_letter(own, base, batch, *, model, task):
    """KL to the base of each letter's distribution, on the policy's own texts; mean over x."""
    p = exact.of_batch(own, batch, model=model, task=task).reshape(-1) / task.prompts
    logp, ref = (
        np.asarray(measure.next_logp(w, batch.tokens, model=model), np.float64) for w in (own, base)
    )
    kl = (np.exp(logp) * (logp - ref)).sum(axis=-1)[:, :-1]
    said = np.asarray(batch.mask)[:, 1:]
    return np.array([p @ row for row in kl[said].reshape(len(p), task.length).T])


def _some(p: np.ndarray, task: Tagged) -> np.ndarray:
    """Texts drawn from a law over the support, evenly for each x."""
    rng, texts = np.random.default_rng(0), exact.support(task)
    n = SHOWN // task.prompts
    rows = [rng.choice(len(own), n, p=own) for own in p]
    return np.stack([texts.letters[x, row] for x, row in enumerate(rows)])


# ---- good text


def good_text(
    trained: Trained, *, task: Tagged, tag: str | None = None, rounds: int = 1, least: float = -1e9
) -> Metrics:
    """How far what is said behind a tag is from π₀ σ(r)^rounds, of texts with r ≥ `least`."""
    model, texts = trained.config.learners["policy"].model, exact.support(task)
    base = exact.law(trained.before["base"]["policy"], model=headless(model), task=task)
    own = exact.law(trained.weights["policy"], model=model, task=task, tag=tag)
    crisp = least > -1e9
    score = np.where(texts.reward >= least, 0.0, -np.inf) if crisp else rounds * log_good(task)
    target = exact.tilt(base, score)
    found = {
        "to_posterior": exact.variation(own, target),
        "kl_posterior": exact.kl(own, target),
        "to_base": exact.variation(own, base),
        "kl_base": exact.kl(own, base),
        "kl_within": exact.kl_within(own, base, texts.reward),
        "reward": exact.mean(own, texts.reward),
        "reward_posterior": exact.mean(target, texts.reward),
        "reward_base": exact.mean(base, texts.reward),
        "posterior_to_base": exact.variation(target, base),
    }
    return found | {"luck": found["reward"] - found["reward_posterior"]}


def headless(model: Letters) -> Letters:
    """The same model without a value head, which the base has not."""
    return replace(model, value_head=False)


def called(trained: Trained, *, task: Tagged, **target: Any) -> Metrics:
    """`good_text` behind GOOD, and whether the tags' texts together are still the base's."""
    model, base = trained.config.learners["policy"].model, trained.before["base"]["policy"]
    say = partial(exact.law, model=model, task=task)
    good, bad, none = (say(trained.weights["policy"], tag=t) for t in ("GOOD", "BAD", None))
    before = say(base)
    chance = (before * np.exp(log_good(task))).sum(axis=1, keepdims=True)
    mixture = chance * good + (1 - chance) * bad
    apart = {
        "mixture_to_base": exact.variation(mixture, before),
        "none_to_base": exact.variation(none, before),
        "mixture_to_none": exact.variation(mixture, none),
        "good_to_bad": exact.variation(good, bad),
    }
    marginal = max(apart[n] for n in ("mixture_to_base", "none_to_base", "mixture_to_none"))
    return good_text(trained, task=task, tag="GOOD", **target) | apart | {"marginal": marginal}


def binned(trained: Trained, *, task: Tagged, edges: tuple[float, ...]) -> Metrics:
    """What is said behind each quantile's tag: reward, bin reached, distance to the base's bin."""
    model, texts = trained.config.learners["policy"].model, exact.support(task)
    say = partial(exact.law, model=model, task=task)
    laws = [say(trained.weights["policy"], tag=tag) for tag in BINS]
    before, reached = say(trained.before["base"]["policy"]), _bins(task, edges)
    targets = [exact.tilt(before, np.where(reached == k, 0.0, -np.inf)) for k in range(len(BINS))]
    found = _requests(laws, targets, reached, texts.reward)
    kl_best = exact.kl(laws[-1], before)
    return found | {"kl_best": kl_best, "to_base": exact.variation(laws[-1], before)}


def on_request(trained: Trained, *, task: Tagged, edges: tuple[float, ...]) -> Metrics:
    """The same of returns to go: a tag before each letter speaks of what is still asked for.

    Asked for are the base's mean rewards of each bin; and, as an extrapolation, more than there is.
    """
    model, texts = trained.config.learners["policy"].model, exact.support(task)
    before = exact.law(trained.before["base"]["policy"], model=model, task=task)
    reached = _bins(task, edges)
    targets = [exact.tilt(before, np.where(reached == k, 0.0, -np.inf)) for k in range(len(BINS))]
    asked = [exact.mean(target, texts.reward) for target in targets]

    def say(request):
        batch = requested(texts.letters, request, task=task, edges=edges)
        return exact.of_batch(trained.weights["policy"], batch, model=model, task=task)

    found = _requests([say(request) for request in asked], targets, reached, texts.reward)
    most = exact.mean(say(2.0 * task.length), texts.reward)
    return found | {"asked": np.array(asked), "reward_of_too_much": most}


def requested(
    letters: np.ndarray, request: float, *, task: Tagged, edges: tuple[float, ...]
) -> Sequences:
    """[BOS, x, tag, y₁, tag, y₂ …]: each tag the bin of the request less what was earned so far."""
    x, n, t = letters.shape
    last = np.broadcast_to(task.letters + np.arange(x)[:, None, None], (x, n, 1))
    before = np.concatenate([last, letters[:, :, :-1]], axis=2)
    earned = exact.step_rewards(task)[np.arange(x)[:, None, None], before, letters]
    left = request - np.concatenate([np.zeros((x, n, 1)), earned.cumsum(axis=2)[:, :, :-1]], axis=2)
    tags = np.array(task.tags(*BINS))[np.asarray(bin_of(jnp.asarray(left), jnp.array(edges)))]
    pairs = np.stack([tags, letters], axis=3).reshape(x * n, 2 * t)
    prompt = np.column_stack([np.full(x * n, task.bos), last.ravel()])
    tokens = jnp.asarray(np.concatenate([prompt, pairs], axis=1), jnp.int32)
    return Sequences(tokens, tokens < task.letters, jnp.ones_like(tokens))


def _bins(task, edges):
    return np.asarray(bin_of(jnp.asarray(exact.support(task).reward), jnp.array(edges)))


def _requests(laws, targets, reached, reward):
    """Asked for and reached, by bin; Spearman's correlation of the two, requests being even."""
    count = len(laws)
    joint = (
        np.array([[exact.mean(p, 1.0 * (reached == k)) for k in range(count)] for p in laws])
        / count
    )
    return {
        "reached": (joint * count) @ np.arange(count),
        "reward": np.array([exact.mean(p, reward) for p in laws]),
        "to_bin": np.array([exact.variation(p, q) for p, q in zip(laws, targets, strict=True)]),
        "spearman": rank_correlation(joint),
    }


def rank_correlation(joint: np.ndarray) -> float:
    """Spearman's ρ of a joint distribution over two ordered scales: of mid-ranks, ties exact."""
    sides = joint.sum(axis=1), joint.sum(axis=0)
    a, b = (side.cumsum() - side / 2 for side in sides)
    a, b = (rank - rank @ side for rank, side in zip((a, b), sides, strict=True))
    return float(a @ joint @ b / np.sqrt((a**2 @ sides[0]) * (b**2 @ sides[1])))


# ---- several arms together


def compared(
    seed: int, before: Mapping[str, Mapping[str, Params]], *, task: Tagged, model: Letters
) -> Metrics:
    """Largest total variation between any two of: asking, weighing, KL-RL, the posterior."""
    del seed
    say = partial(exact.law, model=model, task=task)
    laws = {
        "asked": say(before["condition"]["policy"], tag="GOOD"),
        "weighed": say(before["weighted"]["policy"]),
        "kl_rl": say(before["kl_rl"]["policy"]),
        "posterior": exact.tilt(say(before["base"]["policy"]), log_good(task)),
    }
    names = list(laws)
    pairs = {
        f"{a}_{b}": exact.variation(laws[a], laws[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return pairs | {"most": max(pairs.values())}
