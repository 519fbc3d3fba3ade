"""PPO with adapters on a model from a local directory of Hugging Face, towards positive sentiment.

    rlhf-jax train experiments/models/ppo.py --set model.path=DIR --out runs/model_ppo
    rlhf-jax sample runs/model_ppo --prompt "the film"
    rlhf-jax export runs/model_ppo --out runs/model_ppo/export

DIR holds config.json, safetensors and tokenizer.json. Policy and critic are terms of low rank over
one frozen copy of its weights, which is the reference, too. The reward is VADER's score of movie
and product sentences that the policy continues; `reward` below is the function to change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Checkpointing, Config, ConfigError, From, Frozen, Learner, Rollouts
from rlhf_jax.data import snippets, streams, tokenizers, vader
from rlhf_jax.models import pretrained
from rlhf_jax.models.transformer import Lora
from rlhf_jax.objectives import ppo, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_text
from rlhf_jax.sampling import Sampling


@dataclass(frozen=True)
class Local:
    """A directory of Hugging Face, and how its model is computed and trained."""

    path: str = ""
    rank: int = 16
    alpha: float = 32.0
    dtype: str = "float32"  # of activations; "bfloat16" on accelerators
    remat: str = "none"
    scan: bool = True  # one program for all layers: compiles in a fraction of the time

    def base(self):
        """The model as it is, without adapter."""
        if not self.path:
            raise ConfigError("name a directory of Hugging Face: --set model.path=DIR")
        changes = {"dtype": self.dtype, "remat": self.remat, "scan": self.scan}
        return pretrained.model(self.path, **changes)


def reward(path: str):
    """What a text earns: here VADER's compound score, −1 to 1, on the host."""
    return from_text(score=vader.vader_compound, tokenizer=path)


def config(model: Local = Local(), steps: int = 20, rows: int = 32) -> Config:
    """Policy and critic over one base."""
    base = model.base()
    low = replace(base, lora=Lora(model.rank, model.alpha))
    tokenizer = tokenizers.load(model.path)
    rate = partial(adam, learning_rate=3e-4, final=0.1, steps=steps * 4, warmup=4)
    prompts = partial(
        streams.prompts,
        batch=rows,
        length=12,
        tokenizer=model.path,
        words=(2, 4),
        truncate=True,
        source=partial(snippets.rows, split="base", parts=("movie", "product")),
    )
    train = {"optimizer": rate, "base": "reference", "epochs": 2, "minibatches": 2}
    critic = replace(low, lm_head=False, value_head=True)
    return Config(
        name="model_ppo",
        steps=steps,
        tokenizer=model.path,
        data={"prompts": prompts},
        learners={
            "policy": Learner(low, partial(ppo, clip=0.2), **train),
            "critic": Learner(critic, partial(value, clip=0.2), **train),
        },
        frozen={"reference": Frozen(From(path=model.path), base)},
        rollouts=Rollouts(
            reward(model.path),
            length=24,
            sampling=Sampling(stop=tokenizer.stops, banned=tokenizer.never),
            kl=KL(initial=0.05, adaptive=True, target=6.0, horizon=2_000),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=8,
        ),
        checkpoint=Checkpointing(every=20),
    )
