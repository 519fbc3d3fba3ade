"""What changed, by a judge that training never met: fresh samples of both policies."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gold
import jax
import jax.numpy as jnp
import numpy as np
import quickstart_base as base

from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Config
from rlhf_jax.data import tokenizers
from rlhf_jax.models import weights
from rlhf_jax.rollout import generate
from rlhf_jax.score import score


def verdict(out: Path, *, run: Config, prompts: Callable, seed: int) -> None:
    """Write results.json: gold score, KL, diversity and likelihood, before and after PPO.

    Both policies continue the same held-out prompts with the same random keys; differences are
    paired by prompt. Intervals are 95 %, normal, over samples.
    """
    model, spec = run.learners["policy"].model, run.rollouts
    fresh = model.init(jax.random.key(0))
    policies = {
        "before": weights.fill(fresh, weights.load(base.WEIGHTS), origin=base.WEIGHTS),
        "after": weights.fill(fresh, restore_params(out / run.name, "policy"), origin=run.name),
    }
    batch = jax.tree.map(jnp.asarray, next(iter(prompts(seed=seed, shard=(0, 1)))))
    samples = batch.length.shape[0]
    sample = jax.jit(partial(generate, model=model, length=spec.length))
    logp = jax.jit(lambda params, rollout: score({"self": params}, rollout, models={"self": model}))
    judge, correlation = gold.fitted(base.PARTS)
    tokenizer = tokenizers.load(base.TOKENIZER)

    texts, scores, nll, own, distinct, length = {}, {}, {}, {}, {}, {}
    for name, params in policies.items():
        rollout = sample(params, batch, jax.random.key(seed), sampling=spec.sampling)
        mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
        used = np.asarray(rollout.segments) > 0
        texts[name] = [tokenizer.decode(t[u].tolist()) for t, u in zip(tokens, used, strict=True)]
        scores[name] = judge(texts[name])
        under_base = np.asarray(logp(policies["before"], rollout).logp)
        own[name] = np.asarray(logp(params, rollout).logp)
        nll[name] = -under_base.sum() / mask.sum()
        own[name] = (own[name] - under_base).sum(-1)  # log-ratio of each sample: its mean is KL
        pairs = [
            tuple(row[i : i + 2])
            for row in (t[m].tolist() for t, m in zip(tokens, mask, strict=True))
            for i in range(len(row) - 1)
        ]
        distinct[name] = len(set(pairs)) / max(1, len(pairs))
        length[name] = mask.sum(-1)

    gain = scores["after"] - scores["before"]
    kl = own["after"]
    rows = [
        _row("gold score before", scores["before"], "rating −4…4"),
        _row("gold score after", scores["after"], "rating −4…4"),
        _row("gain in gold score", gain, "rating", "paired by prompt"),
        _row("KL(policy‖base)", kl, "nats per sample"),
        {"name": "distinct-2 before", "value": distinct["before"]},
        {"name": "distinct-2 after", "value": distinct["after"]},
        {
            "name": "distinct-2 after / before",
            "value": distinct["after"] / distinct["before"],
            "note": f"over all word pairs of {samples} samples",
        },
        {
            "name": "base model's NLL of its own samples",
            "value": nll["before"],
            "unit": "nats/word",
        },
        {"name": "base model's NLL of the new samples", "value": nll["after"], "unit": "nats/word"},
        _row("length before", length["before"], "tokens"),
        _row("length after", length["after"], "tokens"),
        {
            "name": "judge's correlation with people",
            "value": correlation,
            "note": "on held-out sentences; it is a proxy of people, not people",
        },
    ]
    order = np.argsort(gain)
    shown = [
        {"before": texts["before"][i], "after": texts["after"][i], "gain": float(gain[i])}
        for i in [*order[-4:][::-1], *order[len(order) // 2 - 2 :][:4], *order[:4]]
    ]
    clear = rows[2]["low"] > 0
    sentence = (
        f"On {samples} held-out prompts a judge that training never met rates the samples "
        f"{rows[1]['value']:.2f} after PPO and {rows[0]['value']:.2f} before: "
        f"{'a clear gain' if clear else 'no clear gain'} of {gain.mean():.2f} "
        f"[{rows[2]['low']:.2f}, {rows[2]['high']:.2f}], at {kl.mean():.1f} nats of KL per sample."
    )
    found = {"title": "Verdict", "text": sentence, "rows": rows, "samples": shown}
    (out / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    print(sentence, flush=True)


def _row(name, values, unit, note=""):
    values = np.asarray(values, np.float64)
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    found = {"name": name, "value": mean, "low": mean - half, "high": mean + half, "unit": unit}
    return found | ({"note": note} if note else {})
