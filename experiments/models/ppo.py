"""PPO with adapters on a model from a local directory of Hugging Face, towards positive sentiment.

    rlhf-jax train experiments/models/ppo.py --set model.path=DIR --out runs/model_ppo
    rlhf-jax sample runs/model_ppo --prompt "the film"
    rlhf-jax export runs/model_ppo --out runs/model_ppo/export

DIR holds config.json, safetensors and tokenizer.json. Policy and critic are terms of low rank over
one frozen copy of its weights, which is the reference, too. The reward is VADER's score of movie
and product sentences that the policy continues; `reward` below is the function to change.
"""

from __future__ import annotations

from functools import partial

from local import Local

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Checkpointing, Config, Rollouts
from rlhf_jax.data import snippets, streams, vader
from rlhf_jax.objectives import ppo, value
from rlhf_jax.rewards import KL, from_text


def reward(path: str):
    """What a text earns: here VADER's compound score, −1 to 1, on the host."""
    return from_text(score=vader.vader_compound, tokenizer=path)


def config(model: Local = Local(), steps: int = 20, rows: int = 32) -> Config:
    """Policy and critic over one base."""
    train = {"updates": steps * 4, "epochs": 2, "minibatches": 2}
    prompts = partial(
        streams.prompts,
        batch=rows,
        length=12,
        tokenizer=model.path,
        words=(2, 4),
        truncate=True,
        source=partial(snippets.rows, split="base", parts=("movie", "product")),
    )
    return Config(
        name="model_ppo",
        steps=steps,
        tokenizer=model.path,
        data={"prompts": prompts},
        learners={
            "policy": model.learner(model.policy(), partial(ppo, clip=0.2), **train),
            "critic": model.learner(model.scalar(), partial(value, clip=0.2), **train),
        },
        frozen={"reference": model.whole()},
        rollouts=Rollouts(
            reward(model.path),
            length=24,
            sampling=model.sampling(),
            kl=KL(initial=0.05, adaptive=True, target=6.0, horizon=2_000),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=8,
        ),
        checkpoint=Checkpointing(every=20),
    )
