"""The arms of `credit_horizon.py`: reward × horizon × place of the KL, and the estimators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_jax import advantages
from rlhf_jax.aggregate import over_sequences
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn, one_prompt
from rlhf_jax.objectives import (
    combine,
    ppo,
    reference_kl,
    reference_kl_vocab,
    reinforce,
    value,
)
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.study import Arm, Settings
from tasks import chain, chain_measures, local, local_measures
from tasks.likelihood import likelihood

HORIZONS = {"h1": 1, "h2": 2, "whole": None}  # tokens of credit; None: to the end
CPU_CHAIN = ("final_h1", "final_h2", "final_whole", "token_h1")
ESTIMATORS = {
    "none": (advantages.reward_to_go, None, "REINFORCE without a baseline"),
    "mean": (advantages.batch_mean, None, "REINFORCE, the batch's mean as baseline"),
    "leave_one_out": (advantages.leave_one_out, None, "REINFORCE, leave-one-out of 4 (RLOO)"),
    "gae": (partial(advantages.gae, trace=0.95), "critic", "PPO, a learned critic, λ = 0.95"),
    "gae_0": (partial(advantages.gae, trace=0.0), "critic", "PPO, a learned critic, λ = 0"),
    "gae_1": (partial(advantages.gae, trace=1.0), "critic", "PPO, a learned critic, λ = 1"),
    "oracle": (advantages.reward_to_go, "oracle", "REINFORCE, the base's true values as baseline"),
}
CPU_LOCAL = ("none", "mean", "leave_one_out", "gae")
EPOCHS = 2  # of PPO


def base(settings: Settings, which: str) -> Config:
    """A language model of one toy's texts."""
    sizes, (task, model, _) = settings.data, _toy(settings, which)
    texts = partial(chain.walk, vocab=task.vocab, length=task.length)
    rate = partial(adam, learning_rate=sizes.base_rate, final=0.02, steps=sizes.base_steps)
    return likelihood(
        f"{which}_base", model, texts, steps=sizes.base_steps, rows=sizes.base_rows,
        optimizer=rate, mesh=settings.mesh,
    )  # fmt: skip


def _toy(settings: Settings, which: str) -> tuple[Any, Any, tuple[int, float]]:
    """Task, model, and a step's rows and rate; the chain needs half the layers."""
    train = settings.train
    if which == "chain":
        layers = max(1, settings.model.layers // 2)
        task, sizes = settings.data.chain, (train.rows, train.rate)
        return task, task.model(settings.model, layers=layers), sizes
    task = settings.data.local
    return task, task.model(settings.model), (train.local_rows, train.local_rate)


def horizons(settings: Settings) -> dict[str, Arm]:
    """On the chain: the reward at the end or by token, credit for h tokens, KL here or there."""
    found, task = {}, settings.data.chain
    at = tuple(sorted({settings.train.steps * i // 20 for i in range(20)}))
    for reward in ("final", "token"):
        for label, reach in HORIZONS.items():
            for inside in (False, True):
                name = f"{reward}_{label}" + "_return" * inside
                if not settings.full and name not in CPU_CHAIN:
                    continue
                dense, reach = reward == "token", reach or task.length
                paid = partial(chain.by_token if dense else chain.at_the_end, task=task)
                credit = partial(advantages.credit_horizon, horizon=reach)
                run = _run(
                    settings, "chain", name, inside=inside, reward=paid, advantage=credit,
                    value=None if dense else "critic",
                )  # fmt: skip
                says = (
                    f"{'paid token by token' if dense else 'paid at the end'}, credit for "
                    + {"h1": "1 token", "h2": "2 tokens", "whole": "the whole text"}[label]
                    + (", KL in the return" if inside else ", KL of each token by itself")
                )
                measure = partial(
                    chain_measures.horizon, task=task, beta=settings.data.beta, reach=reach,
                    dense=dense, inside=inside,
                )  # fmt: skip
                found[name] = Arm(run, says, at, measure)
    return found


def estimators(settings: Settings) -> dict[str, Arm]:
    """On the long text, paid at the end: who gets the credit."""
    found, task, steps = {}, settings.data.local, settings.train.steps
    at, samples = (0, steps // 8, steps // 4, steps // 2), settings.data.samples
    measure = partial(local_measures.credit, task=task, samples=samples, compare=(0, steps // 4))
    for name, (advantage, critic, says) in ESTIMATORS.items():
        if settings.full or name in CPU_LOCAL:
            run = _run(
                settings, "local", name, reward=partial(chain.at_the_end, task=task),
                advantage=advantage, value=critic, samples=settings.train.samples,
                epochs=EPOCHS if critic == "critic" else 1,
            )  # fmt: skip
            found[name] = Arm(run, says, at, measure)
    return found


def _run(
    settings: Settings, which: str, name: str, *, epochs: int = 1, inside: bool = False,
    samples: int = 1, **rollouts: Any,
) -> Config:  # fmt: skip
    """RL on one toy; KL to the base is a loss of each token by itself, or `inside` the reward."""
    (task, model, (rows, rate)), start = _toy(settings, which), From(stage=f"{which}_base")
    steps, beta = settings.train.steps, settings.data.beta
    rate = partial(adam, learning_rate=rate, final=0.0, steps=steps * epochs)
    common = {"optimizer": rate, "start": start, "epochs": epochs}
    policy = partial(ppo, aggregate=over_sequences) if epochs > 1 else reinforce
    if inside:
        learners = {"policy": Learner(model, policy, **common)}
    else:
        price = partial(reference_kl, coefficient=beta, aggregate=over_sequences)
        both = partial(combine, policy=policy, kl=price)
        fields = {"vocab": reference_kl_vocab, "scores": ("reference",)}
        learners = {"policy": Learner(model, both, **fields, **common)}
    frozen = {"reference": Frozen(start, model)}
    if rollouts["value"] == "critic":
        critic = replace(model, lm_head=False, value_head=True)
        learners["critic"] = Learner(critic, partial(value, clip=None), **common)
    elif rollouts["value"] == "oracle":
        frozen["oracle"] = Frozen(start, local.Oracle(task, task.vocab + 1))
    prompts = partial(one_prompt, tokens=(task.start,))
    return Config(
        name=name,
        steps=steps,
        data={"prompts": partial(drawn, draw=prompts, batch=rows // samples)},
        learners=learners,
        frozen=frozen,
        rollouts=Rollouts(
            length=task.length, samples=samples, kl=KL(beta * inside, adaptive=False), show=0,
            reference="reference" if inside else None, **rollouts,
        ),
        mesh=settings.mesh,
    )  # fmt: skip
