"""What a trained policy says to held-out prompts, behind each control token that it knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import quickstart_base as base

from rlhf_jax import measure
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.conditioning import tagged
from rlhf_jax.config import Config
from rlhf_jax.data import snippets, streams, tokenizers, vader
from rlhf_jax.models import weights
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.rollout import generate
from rlhf_jax.score import score

GOOD, BAD = 4, 5  # the tokenizer's control tokens
ROWS, SEED = 512, 11


def measured(out: Path, *, run: Config, stage: str, tags: Mapping[str, Sequence[int]]) -> None:
    """Write results.json: VADER's score, KL to the base, entropy, distinct-2, behind each tag.

    All continue the same held-out prompts with the same random keys; `tags` names what is put
    behind BOS, nothing for (). KL is that of whole samples to the base model, which does not see
    the tag. Intervals are 95 %, normal, over samples.
    """
    model, spec = run.learners["policy"].model, run.rollouts
    fresh = model.init(jax.random.key(0))
    start = weights.fill(fresh, weights.load(base.WEIGHTS), origin=base.WEIGHTS)
    after = weights.fill(fresh, restore_params(out / stage, "policy"), origin=stage)
    prompts = streams.prompts(
        seed=SEED,
        shard=(0, 1),
        batch=ROWS,
        length=8,
        tokenizer=base.TOKENIZER,
        words=(2, 4),
        truncate=True,
        source=partial(snippets.rows, split="heldout", parts=base.PARTS),
    )
    batch = jax.tree.map(jnp.asarray, next(iter(prompts)))
    tokenizer = tokenizers.load(base.TOKENIZER)
    sample = jax.jit(
        partial(generate, model=model, length=spec.length, sampling=spec.sampling)
    )  # fmt: skip
    plain = Untagged(model, tags=(GOOD, BAD))
    models = {"self": model, "reference": plain}

    @jax.jit
    def both(params, rollout):
        return score({"self": params, "reference": start}, rollout, models=models)

    rows, said = [], {}
    for name, params, tag in [("base", start, ()), *((n, after, t) for n, t in tags.items())]:
        asked = tagged(batch, jax.random.key(0), tags=tuple(tag)) if tag else batch
        rollout = sample(params, asked, jax.random.key(SEED))
        found, mask = both(params, rollout), np.asarray(rollout.mask)
        tokens, used = np.asarray(rollout.tokens), np.asarray(rollout.segments) > 0
        used &= ~np.isin(tokens, (GOOD, BAD))
        texts = [tokenizer.decode(t[u].tolist()) for t, u in zip(tokens, used, strict=True)]
        kl = np.where(mask, found.logp - found["reference"].logp, 0).sum(1)
        entropy = np.asarray(found.entropy)[mask]
        rows += [
            _row(f"{name}: VADER's score", [vader.vader_compound(t) for t in texts], "−1…1"),
            _row(f"{name}: KL to the base", kl, "nats per sample"),
            _row(f"{name}: entropy", entropy, "nats per token"),
            {"name": f"{name}: distinct-2", "value": float(measure.distinct(tokens, mask, 2))},
        ]
        said[name] = texts
    names = list(said)
    samples = [{name: said[name][i] for name in names} for i in range(8)]
    scores = ", ".join(
        f"{row['name'].split(':')[0]} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for row in rows[::4]
    )
    sentence = f"VADER's score on {ROWS} held-out prompts: {scores}."
    found = {"title": "Measured", "text": sentence, "rows": rows, "samples": samples}
    (out / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for row in rows:
        print(f"{row['name']:32s} {row['value']:8.3f}  {row.get('unit', '')}")
    print(sentence, flush=True)


def _row(name, values, unit):
    values = np.asarray(values, np.float64)
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return {"name": name, "value": mean, "low": mean - half, "high": mean + half, "unit": unit}
