"""The quickstart: a small language model learns from human preferences, on a laptop's CPU.

    rlhf-jax train experiments/quickstart.py --out runs/quickstart

Stages, each resumable: `reward` fits a reward model to pairs of sentences, of which the preferred
one is decided by real people's ratings; `ppo` trains the base model (shipped, see
quickstart_base.py) against it, with a KL penalty; `verdict` asks a judge that training never met
(gold.py) what it thinks of fresh samples on held-out prompts. Settings were fixed before the final
seed. Expect a gain of 0.64 [0.55, 0.74] on the scale −4 … 4, at 4.1 nats of KL per sample, with
distinct-2 at 0.89 of the base's; other versions of the code gained 0.67 and 0.79.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import quickstart_base as base
from quickstart_verdict import verdict

from rlhf_jax import masked
from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import (
    Checkpointing,
    Config,
    Evaluation,
    From,
    Frozen,
    Learner,
    Pipeline,
    Rollouts,
)
from rlhf_jax.data import pairing, snippets, streams, tokenizers
from rlhf_jax.objectives import ppo, reward_model, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model, missing_eos
from rlhf_jax.sampling import Sampling

SCALAR = replace(base.MODEL, lm_head=False, value_head=True)
PAD, BOS, EOS, UNK, GOOD, BAD = range(6)
SAMPLING = Sampling(temperature=0.8, stop=(EOS,), banned=(PAD, BOS, UNK, GOOD, BAD))
STEPS = {"reward": 160, "ppo": 80}
SEED = 1  # settings were chosen with seed 0


def rows(split: str):
    """Movie and product sentences of one split."""
    return partial(snippets.rows, split=split, parts=base.PARTS)


def openings(split: str) -> list[str]:
    """The first four words of a split's sentences, where the tokenizer knows them all."""
    encode = tokenizers.load(base.TOKENIZER).encode
    texts = (" ".join(row["text"].split()[:4]) for row in rows(split)())
    return [text for text in texts if UNK not in encode(text)]


def too_short(reward, rollout, *, coefficient: float, least: int):
    """Takes coefficient · max(least − tokens, 0) from the last token: praise in a word is cheap."""
    missing = jnp.maximum(least - rollout.mask.sum(axis=1), 0)
    return reward - masked.at_last(coefficient * missing, rollout.mask)


def prompts(split: str, batch: int):
    """Two to four words to go on from."""
    return partial(
        streams.prompts,
        batch=batch,
        length=8,
        tokenizer=base.TOKENIZER,
        words=(2, 4),
        truncate=True,
        source=partial(openings, split),
    )


def reward() -> Config:
    """Bradley–Terry on pairs whose preferred sentence real raters chose."""
    steps = STEPS["reward"]
    pairs = partial(
        streams.pairs, batch=32, length=base.LENGTH, tokenizer=base.TOKENIZER, gap=1.0
    )  # fmt: skip
    return Config(
        name="reward",
        seed=SEED,
        steps=steps,
        tokenizer=base.TOKENIZER,
        data={
            "pairs": partial(pairs, source=rows("reward")),
            "heldout": partial(pairs, source=rows("heldout"), label=pairing.mean_rating),
        },
        learners={
            "reward": Learner(
                SCALAR,
                partial(reward_model, centre=0.01),
                batch="pairs",
                start=From(path=base.WEIGHTS),
                optimizer=partial(
                    adam, learning_rate=1e-3, final=0.05, steps=steps, warmup=10, weight_decay=0.3
                ),
            )
        },
        evaluation={"heldout": Evaluation("reward", "heldout", batches=8, every=30)},
        checkpoint=Checkpointing(every=60),
    )


def policy_gradient() -> Config:
    """PPO against the reward model, paid in units of its spread over the base model's samples."""
    steps = STEPS["ppo"]
    optimizer = partial(adam, learning_rate=3e-4, final=0.1, steps=steps * 8, warmup=16)
    return Config(
        name="ppo",
        seed=SEED,
        steps=steps,
        tokenizer=base.TOKENIZER,
        data={"prompts": prompts("base", 64)},
        learners={
            "policy": Learner(
                base.MODEL,
                partial(ppo, clip=0.2),
                start=From(path=base.WEIGHTS),
                optimizer=optimizer,
                epochs=2,
                minibatches=4,
            ),
            "critic": Learner(
                SCALAR,
                partial(value, clip=0.2),
                start=From(path=base.WEIGHTS),
                optimizer=partial(optimizer.func, **{**optimizer.keywords, "learning_rate": 1e-3}),
                epochs=2,
                minibatches=4,
            ),
        },
        frozen={
            "reference": Frozen(From("policy")),
            "reward": Frozen(From("reward", stage="reward"), SCALAR),
        },
        rollouts=Rollouts(
            partial(from_model, model=SCALAR, learner="reward"),
            length=24,
            sampling=SAMPLING,
            kl=KL(initial=0.15, adaptive=True, target=4.0, horizon=2_000),
            shaping=(
                partial(missing_eos, penalty=0.5),
                partial(too_short, coefficient=0.1, least=14),
            ),
            normalise=512,
            advantage=partial(whitened, advantage=partial(gae, discount=1.0, trace=0.95)),
            show=12,
            show_every=40,
        ),
        checkpoint=Checkpointing(every=40),
    )


def config() -> Pipeline:
    """Reward model, PPO, verdict."""
    run = policy_gradient()
    judge = partial(verdict, run=run, prompts=prompts("heldout", 512), seed=SEED + 10)
    return Pipeline("quickstart", {"reward": reward(), "ppo": run, "verdict": judge})
