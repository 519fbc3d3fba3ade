"""A reward model that goes on learning from the policy's own samples, or stops: does it matter?

    rlhf-jax train experiments/online_reward_model.py --out runs/online
    rlhf-jax train experiments/online_reward_model.py --out runs/offline \
        --set stages.online.learners.reward.when.n=40

The gold standard is a program that only answers which of two samples it prefers: VADER's compound
score (−1 … 1), with Bradley–Terry noise. For 40 steps the reward model learns from the base model's
samples alone; then the policy learns from the reward model, and in the first command the reward
model from the policy's samples, which drift to where the first 40 steps told it nothing. The second
command differs in one number, and asks for no more labels. `verdict` compares the gold scores of
the base model and of the policy on other prompts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import quickstart_base as base

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import (
    Checkpointing,
    Config,
    Derived,
    From,
    Frozen,
    Learner,
    Pipeline,
    Rollouts,
)
from rlhf_jax.data import snippets, streams, vader
from rlhf_jax.labelling import compare, on_host
from rlhf_jax.models import weights
from rlhf_jax.objectives import ppo, reward_model, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model, from_text, missing_eos
from rlhf_jax.rollout import Sampling, generate

SCALAR = replace(base.MODEL, lm_head=False, value_head=True)
GOLD = from_text(score=vader.vader_compound, tokenizer=base.TOKENIZER)
SAMPLING = Sampling(temperature=1.0, stop=(2,), banned=(0, 1, 3, 4, 5))
FIRST, STEPS = 40, 120  # the reward model learns alone; all steps


def before(step: int, *, n: int) -> bool:
    """Learn at the first n steps."""
    return step < n


def after(step: int, *, n: int) -> bool:
    """Learn at all steps but the first n."""
    return step >= n


def prompts(split: str, batch: int):
    """Two to four words to go on from."""
    return partial(
        streams.prompts,
        batch=batch,
        length=8,
        tokenizer=base.TOKENIZER,
        words=(2, 4),
        truncate=True,
        source=partial(snippets.rows, split=split, parts=base.PARTS),
    )


def verdict(out: Path, *, run: Config, samples: int = 256) -> None:
    """Write results.json: the gold score of samples of the base model and of the policy."""
    model, spec = run.learners["policy"].model, run.rollouts
    fresh = model.init(jax.random.key(0))
    batch = next(iter(prompts("heldout", samples)(seed=run.seed + 10, shard=(0, 1))))
    sample = jax.jit(partial(generate, model=model, length=spec.length, sampling=spec.sampling))
    found = {}
    for name, params in (
        ("base", weights.load(base.WEIGHTS)),
        ("policy", restore_params(out / "online", "policy")),
    ):
        params = weights.fill(fresh, params, origin=name)
        rollout = sample(params, jax.tree.map(jnp.asarray, batch), jax.random.key(run.seed + 10))
        found[name] = np.asarray(GOLD(rollout, {}), np.float64).sum(axis=1)
    gain = found["policy"] - found["base"]
    half = 1.96 * gain.std(ddof=1) / samples**0.5
    sentence = (
        f"On {samples} held-out prompts the gold score is {found['base'].mean():.2f} before and "
        f"{found['policy'].mean():.2f} after: a gain of {gain.mean():.2f} ± {half:.2f}."
    )
    rows = [{"name": f"gold score of the {name}", "value": x.mean()} for name, x in found.items()]
    low, high = gain.mean() - half, gain.mean() + half
    rows.append({"name": "gain", "value": gain.mean(), "low": low, "high": high})
    result = {"title": "Verdict", "text": sentence, "rows": rows}
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(sentence, flush=True)


def online() -> Config:
    """Policy, critic and reward model; comparisons of two samples of one prompt."""
    rate = partial(adam, learning_rate=3e-4, final=0.1, steps=(STEPS - FIRST) * 4)
    start = From(path=base.WEIGHTS)
    return Config(
        name="online",
        steps=STEPS,
        tokenizer=base.TOKENIZER,
        data={"prompts": prompts("base", 32)},
        learners={
            "policy": Learner(
                base.MODEL,
                partial(ppo, clip=0.2),
                start=start,
                optimizer=rate,
                minibatches=4,
                when=partial(after, n=FIRST),
            ),
            "critic": Learner(
                SCALAR,
                partial(value, clip=0.2),
                start=start,
                optimizer=partial(adam, learning_rate=1e-3),
                minibatches=4,
                when=partial(after, n=FIRST // 2),
            ),
            "reward": Learner(
                SCALAR,
                partial(reward_model, centre=0.01),
                batch="comparisons",
                start=start,
                optimizer=partial(adam, learning_rate=1e-3, warmup=10, weight_decay=0.1),
                when=partial(before, n=STEPS),
            ),
        },
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(
            partial(from_model, model=SCALAR, learner="reward"),
            length=24,
            samples=2,
            sampling=SAMPLING,
            kl=KL(initial=0.1, adaptive=True, target=6.0, horizon=2_000),
            shaping=(partial(missing_eos, penalty=0.5),),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=8,
            show_every=40,
        ),
        derived={
            "comparisons": Derived(on_host(partial(compare, oracle=GOLD, temperature=0.25))),
        },
        checkpoint=Checkpointing(every=60),
    )


def config() -> Pipeline:
    """The run and its verdict."""
    run = online()
    return Pipeline("online_reward_model", {"online": run, "verdict": partial(verdict, run=run)})
