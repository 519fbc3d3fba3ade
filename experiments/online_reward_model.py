"""A reward model that goes on learning from the policy's own samples, or stops: does it matter?

    rlhf-jax train experiments/online_reward_model.py --out runs/online
    rlhf-jax train experiments/online_reward_model.py --out runs/offline \
        --set stages.run.learners.reward.when.n=150

Texts are 16 bytes; gold is best where a quarter of them are lower-case letters, and all that is
asked of it is which of two samples is the better one, with Bradley–Terry noise. At the start every
tenth byte is a letter, so the first 150 steps teach the reward model, alone, that more letters are
better. Then the policy learns from it: in the first command the reward model goes on asking about
the policy's samples, in the second it has stopped. That is the one number in which they differ.
Expect 23 % letters and a gold score of −0.14 from the first, 38 % and −0.27 from the second, which
its reward model takes for its best (seed 1: 25 % and 38 %). A minute and a half each.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import smoke

from rlhf_jax import masked
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
from rlhf_jax.data import streams, tokenizers
from rlhf_jax.labelling import compare
from rlhf_jax.models import weights
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import ppo, reward_model, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling

FIRST, STEPS, BEST = (
    150,
    300,
    0.25,
)  # the reward model learns alone; all steps; the share of letters
MODEL = Transformer(vocab=264, width=32, layers=1, heads=4, kv_heads=2, mlp=64, context=64)
SCALAR = replace(MODEL, lm_head=False, value_head=True)
SAMPLING = Sampling(stop=(smoke.EOS,), banned=(smoke.PAD, smoke.BOS))
A = tokenizers.load("bytes").encode("a")[0]


def letters(rollout):
    """The share of lower-case letters among the chosen tokens."""
    letter = (rollout.tokens >= A) & (rollout.tokens < A + 26)
    return masked.mean(letter, rollout.mask, axis=1)


def gold(rollout, params):
    """0 where a quarter of the bytes are letters, −0.5 where none are, −1.5 where all are."""
    return masked.at_last(-2.0 * jnp.abs(letters(rollout) - BEST), rollout.mask)


def before(step: int, *, n: int) -> bool:
    """Learn at the first n steps."""
    return step < n


def after(step: int, *, n: int) -> bool:
    """Learn at all steps but the first n."""
    return step >= n


def prompts(batch: int):
    """The first letters of a made-up sentence."""
    return partial(
        streams.prompts, batch=batch, length=8, words=(1, 1), tokenizer="bytes", source=smoke.ROWS
    )


def run() -> Config:
    """Policy, critic and reward model; comparisons of two samples of one prompt."""
    fast = partial(adam, learning_rate=3e-3)
    return Config(
        name="online_reward_model",
        steps=STEPS,
        data={"prompts": prompts(64)},
        learners={
            "policy": Learner(
                MODEL,
                partial(ppo, clip=0.2),
                optimizer=fast,
                minibatches=4,
                when=partial(after, n=FIRST),
            ),
            "critic": Learner(
                SCALAR,
                partial(value, clip=0.2),
                optimizer=fast,
                minibatches=4,
                when=partial(after, n=FIRST),
            ),
            "reward": Learner(
                SCALAR,
                partial(reward_model, centre=0.01),
                batch="comparisons",
                optimizer=fast,
                when=partial(before, n=STEPS),
            ),
        },
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(
            partial(from_model, model=SCALAR, learner="reward"),
            length=16,
            samples=2,
            sampling=SAMPLING,
            kl=KL(initial=0.01, adaptive=False),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=4,
            show_every=150,
        ),
        derived={"comparisons": Derived(partial(compare, oracle=gold, temperature=0.1))},
        checkpoint=Checkpointing(every=150),
    )


def verdict(out: Path) -> None:
    """Write results.json: what gold, and the reward model, say of the policy's samples."""
    fresh = {"policy": MODEL.init(jax.random.key(0)), "reward": SCALAR.init(jax.random.key(0))}
    params = {
        name: weights.fill(tree, restore_params(out / "run", name), origin=name)
        for name, tree in fresh.items()
    }
    batch = jax.tree.map(jnp.asarray, next(iter(prompts(256)(seed=7, shard=(0, 1)))))
    sample = jax.jit(partial(generate, model=MODEL, length=16, sampling=SAMPLING))
    rollout = sample(params["policy"], batch, jax.random.key(7))
    found = {
        "share of letters": letters(rollout),
        "gold": gold(rollout, params).sum(axis=1),
        "reward model": from_model(rollout, params, model=SCALAR).sum(axis=1),
    }
    found = {name: np.asarray(x, np.float64) for name, x in found.items()}
    rows = [{"name": name, "value": x.mean()} for name, x in found.items()]
    sentence = (
        f"{found['share of letters'].mean():.0%} of the bytes are letters, where {BEST:.0%} are "
        f"best: gold {found['gold'].mean():.2f} of at most 0, and the reward model says "
        f"{found['reward model'].mean():.1f}."
    )
    result = {"title": "Verdict", "text": sentence, "rows": rows}
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(sentence, flush=True)


def config() -> Pipeline:
    """The run and its verdict."""
    return Pipeline("online_reward_model", {"run": run(), "verdict": verdict})
