"""A whole PPO run in seconds, without a network: three learners on twelve made-up sentences.

    rlhf-jax train experiments/smoke.py --out runs/smoke

The policy learns to write what the reward model likes, while the reward model goes on learning from
preference pairs at every second step. Bytes are the tokens, the model is tiny: expect nothing of
the text. Tests and CI train it, and a resumed run equals one that never stopped, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rlhf_jax.config import (
    Checkpointing,
    Config,
    Evaluation,
    From,
    Frozen,
    Learner,
    Rollouts,
    every,
)
from rlhf_jax.data import streams
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import ppo, reward_model, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model
from rlhf_jax.sampling import Sampling

PAD, BOS, EOS = 0, 1, 2  # of the byte tokenizer, which has 261 tokens; 264 divides over 8 devices
ROWS = [
    {"text": text, "ratings": [score - 1, score, score, score + 1], "score": float(score)}
    for text, score in (
        ("a lovely film", 3), ("the best of the year", 3), ("good fun", 2), ("it works", 1),
        ("i liked it", 2), ("well made", 2), ("a dull film", -2), ("the worst of all", -3),
        ("bad jokes", -2), ("it drags", -1), ("i left early", -2), ("badly made", -2),
    )
]  # fmt: skip


def config() -> Config:
    """Policy, critic and reward model, all learning in one loop."""
    policy = Transformer(
        vocab=264, width=32, layers=1, heads=4, kv_heads=2, mlp=64, context=64
    )  # fmt: skip
    scalar = replace(policy, lm_head=False, value_head=True)
    data = {"tokenizer": "bytes", "source": ROWS}
    optimizer = partial(adam, learning_rate=1e-3)
    return Config(
        name="smoke",
        steps=8,
        data={
            "prompts": partial(streams.prompts, batch=16, length=8, words=(1, 1), **data),
            "pairs": partial(streams.pairs, batch=16, length=24, **data),
        },
        learners={
            "policy": Learner(policy, partial(ppo, clip=0.2), optimizer=optimizer, minibatches=2),
            "critic": Learner(scalar, partial(value, clip=0.2), optimizer=optimizer, minibatches=2),
            "reward": Learner(
                scalar, reward_model, batch="pairs", optimizer=optimizer, when=partial(every, n=2)
            ),
        },
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(
            partial(from_model, model=scalar, learner="reward"),
            length=16,
            sampling=Sampling(stop=(EOS,), banned=(PAD, BOS)),
            kl=KL(initial=0.1, adaptive=False),
            show=4,
            show_every=4,
        ),
        evaluation={"pairs": Evaluation("reward", "pairs", batches=2, every=4)},
        checkpoint=Checkpointing(every=4),
    )
