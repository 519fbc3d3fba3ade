"""Supervised fine-tuning, a reward model, PPO: all over one local directory of Hugging Face.

    rlhf-jax train experiments/models/chain.py --set model.path=DIR --out runs/model_chain
    rlhf-jax sample runs/model_chain --prompt "the film"
    rlhf-jax export runs/model_chain --stage sft --out runs/model_chain/export_sft
    rlhf-jax export runs/model_chain --stage ppo --out runs/model_chain/export_ppo

Stages, each resumable: `sft` learns to write movie and product sentences, whole ones packed into
rows; `reward` goes on from it and fits pairs of sentences of which people preferred one; `ppo`
trains the policy of `sft` towards that reward, with `sft` as its reference and `reward` as its
first critic. All of them are adapters over one frozen copy of DIR, in each stage the only one that
is in memory; `model.rank=0` trains all weights instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from local import Local

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Checkpointing, Config, Evaluation, From, Pipeline, Rollouts
from rlhf_jax.data import pairing, snippets, streams
from rlhf_jax.objectives import mle, ppo, reward_model, value
from rlhf_jax.rewards import KL, from_model, missing_eos

SFT, REWARD = From("policy", stage="sft"), From("reward", stage="reward")


@dataclass(frozen=True)
class Steps:
    """How long each stage is."""

    sft: int = 100
    reward: int = 100
    ppo: int = 50


def sentences(split: str):
    """Movie and product sentences of one split."""
    return partial(snippets.rows, split=split, parts=("movie", "product"))


def fine_tuning(model: Local, steps: int, rows: int) -> Config:
    """Likelihood of whole sentences, several to a row."""
    text = partial(
        streams.text, batch=rows, length=128, tokenizer=model.path, marks=None, pack=True
    )  # fmt: skip
    policy = model.learner(model.policy(), mle, updates=steps, batch="text", base="base")
    return Config(
        name="sft",
        steps=steps,
        tokenizer=model.path,
        data={
            "text": partial(text, source=sentences("base")),
            "heldout": partial(text, source=sentences("heldout")),
        },
        learners={"policy": policy},
        frozen=model.shared("base"),
        evaluation={"heldout": Evaluation("policy", "heldout", batches=2, every=50)},
        checkpoint=Checkpointing(every=50),
    )


def preferences(model: Local, steps: int, rows: int) -> Config:
    """Bradley–Terry on pairs whose preferred sentence people chose, from the weights of `sft`."""
    pairs = partial(streams.pairs, batch=rows, length=48, tokenizer=model.path)
    objective = partial(reward_model, centre=0.01)
    reward = model.learner(
        model.scalar(), objective, updates=steps, batch="pairs", base="base", start=SFT
    )
    return Config(
        name="reward",
        steps=steps,
        tokenizer=model.path,
        data={
            "pairs": partial(pairs, source=sentences("reward")),
            "heldout": partial(pairs, source=sentences("heldout"), label=pairing.mean_rating),
        },
        learners={"reward": reward},
        frozen=model.shared("base"),
        evaluation={"heldout": Evaluation("reward", "heldout", batches=2, every=50)},
        checkpoint=Checkpointing(every=50),
    )


def policy_gradient(model: Local, steps: int, rows: int) -> Config:
    """PPO from `sft` against `reward`."""
    policy, scalar = model.policy(), model.scalar()
    train = {"updates": steps * 4, "base": "base", "epochs": 2, "minibatches": 2}
    still = model.still({"reference": (policy, SFT), "reward": (scalar, REWARD)}, base="base")
    prompts = partial(
        streams.prompts,
        batch=rows,
        length=12,
        tokenizer=model.path,
        words=(2, 4),
        truncate=True,
        source=sentences("base"),
    )
    return Config(
        name="ppo",
        steps=steps,
        tokenizer=model.path,
        data={"prompts": prompts},
        learners={
            "policy": model.learner(policy, partial(ppo, clip=0.2), start=SFT, **train),
            "critic": model.learner(scalar, partial(value, clip=0.2), start=REWARD, **train),
            **still.learners,
        },
        frozen={**model.shared("base"), **still.frozen},
        rollouts=Rollouts(
            partial(from_model, model=scalar, learner="reward"),
            length=32,
            sampling=model.sampling(),
            shaping=(partial(missing_eos, penalty=0.5),),
            normalise=4 * rows,
            kl=KL(initial=0.05, adaptive=True, target=6.0, horizon=2_000),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
            show=8,
        ),
        checkpoint=Checkpointing(every=25),
    )


def config(model: Local = Local(), steps: Steps = Steps(), rows: int = 16) -> Pipeline:
    """SFT, reward model, PPO."""
    stages = {
        "sft": fine_tuning(model, steps.sft, rows),
        "reward": preferences(model, steps.reward, rows),
        "ppo": policy_gradient(model, steps.ppo, rows),
    }
    return Pipeline("model_chain", stages)
