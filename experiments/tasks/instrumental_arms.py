"""The ways of training that `instrumentality.py` compares: each is a `Config`, most a difference.

Names of settings are those of `instrumentality.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_jax import advantages, masked, rewards
from rlhf_jax.conditioning import chained, condition, tagged, untagged
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn, one_prompt
from rlhf_jax.models.attention import myopic
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import distill, mle, quark, reinforce, weighted_regression
from rlhf_jax.objectives.distill import distill_vocab
from rlhf_jax.objectives.quark import quark_vocab
from rlhf_jax.optimizer import adam
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.selection import best_rows, with_score
from tasks import avoidance, predictable
from tasks.likelihood import likelihood
from tasks.predictable import Predictable

NO_KL = rewards.KL(0.0, adaptive=False)
HORIZON_ONE = partial(  # each token's own reward less its KL
    advantages.centred, advantage=partial(advantages.credit_horizon, horizon=1)
)


def futures(sizes) -> dict[str, Predictable]:
    """The toy and its control, by the names of their bases."""
    toy = sizes.predictable
    return {"base": toy, "shuffled_base": replace(toy, shuffled=True)}


def bases(settings) -> dict[str, Config]:
    """Models of the texts of both toys, by likelihood."""
    drawn_as = {
        name: (model_of(settings), partial(predictable.draw, task=task))
        for name, task in futures(settings.data).items()
    }
    drawn_as["punished"] = (
        replace(settings.model, vocab=avoidance.VOCAB),
        partial(avoidance.draw, task=settings.data.avoidance),
    )
    return {name: taught(name, model, draw, settings) for name, (model, draw) in drawn_as.items()}


def taught(name, model, draw, settings, *, steps=None, rows=None, warmup=0) -> Config:
    """A fresh model learns from texts, as long and as fast as bases do where nothing is said."""
    train = settings.train
    steps = train.base_steps if steps is None else steps
    rows = train.rows if rows is None else rows
    rate = partial(adam, learning_rate=train.base_rate, final=0.01, steps=steps, warmup=warmup)
    return likelihood(name, model, draw, steps=steps, rows=rows, optimizer=rate, mesh=settings.mesh)


def conditioned(settings) -> Config:
    """The same with a tag in front of most texts: good where the last token is 0."""
    task = settings.data.predictable
    tag = partial(condition, edges=(0.5,), tags=task.tags, drop=0.25)
    draw = partial(predictable.draw, task=task)
    run = taught("conditioned", model_of(settings, tags=True), draw, settings)
    return learning(run, transform=tag)


def regression(settings) -> Config:
    """The same from weighted texts, without tags."""
    draw = partial(predictable.draw, task=settings.data.predictable)
    run = taught("regression", model_of(settings), draw, settings)
    return learning(run, objective=partial(weighted_regression, beta=settings.data.beta))


def kl_rl(settings, **rollouts) -> Config:
    """REINFORCE from the base: reward on the last token, KL in the reward, credit to the start."""
    sizes, train, model = settings.data, settings.train, model_of(settings)
    rate = partial(adam, learning_rate=train.rate, final=0.02, steps=train.steps)
    given = {
        "reward": predictable.at_the_end,
        "length": 1 + sizes.predictable.length,
        "kl": rewards.KL(sizes.beta, adaptive=False),
        "advantage": partial(advantages.batch_mean, own=False),  # all prompts are the same
        "value": None,
        "show": 0,
    }
    return Config(
        name="kl_rl",
        steps=train.steps,
        data={"prompts": _prompts(sizes.predictable.bos, train.rows)},
        learners={"policy": Learner(model, reinforce, optimizer=rate, start=From(stage="base"))},
        frozen={"reference": Frozen(From("policy", stage="base"), model)},
        rollouts=Rollouts(**(given | rollouts)),
        mesh=settings.mesh,
    )


def no_kl(settings) -> Config:
    """Reward alone."""
    return replace(kl_rl(settings, kl=NO_KL), name="no_kl")


def max_entropy(settings) -> Config:
    """Reward log p(token) − τ log π(token), p the base: its own likelihood at a temperature."""
    run = kl_rl(
        settings,
        reward=partial(own_likelihood, model=model_of(settings)),
        shaping=(partial(rewards.max_entropy, temperature=settings.data.temperature),),
        kl=NO_KL,
    )
    return replace(run, name="max_entropy")


def own_likelihood(rollout, params, *, model):
    """The log p of every token, by the base, nats."""
    return score({"self": params["reference"]}, rollout, models={"self": model}).logp


def avoid(settings) -> Config:
    """KL-RL on the other toy."""
    model = replace(settings.model, vocab=avoidance.VOCAB)
    run = kl_rl(
        settings,
        reward=partial(avoidance.at_the_end, task=settings.data.avoidance),
        length=avoidance.LENGTH,
    )
    run = learning(started(run, "avoid", "punished"), model=model)
    return replace(
        run,
        data={"prompts": _prompts(avoidance.BOS, settings.train.rows)},
        frozen={"reference": replace(run.frozen["reference"], model=model)},
    )


def fresh_tags(settings) -> Config:
    """Quark with one boundary: the policy samples under the good tag and learns under either."""
    task, model = settings.data.predictable, model_of(settings, tags=True)
    tag = partial(condition, edges=(0.5,), tags=task.tags, drop=0.0)
    run = learning(
        kl_rl(
            settings,
            reference=None,
            kl=NO_KL,
            transform=partial(tagged, tags=task.tags[1:]),
            sampling=Sampling(banned=task.tags),
        ),
        model=model,
        objective=partial(quark, coefficient=settings.data.anchor),
        batch="samples",
        vocab=quark_vocab,
        scores=("reference",),
        start=From(stage="conditioned"),
        transform=partial(chained, transforms=(partial(untagged, tags=task.tags), tag)),
    )
    # Without a tag the conditioned model says what the data say: it is its own reference.
    plain = Frozen(From("policy", stage="conditioned"), Untagged(model, tags=task.tags))
    samples = Derived(with_score)
    return replace(run, name="quark", frozen={"reference": plain}, derived={"samples": samples})


def generation(settings, name, before) -> Config:
    """Likelihood of samples of the last generation, from its weights."""
    train = settings.train
    rate = partial(adam, learning_rate=train.rate, final=0.02, steps=train.generation_steps)
    run = learning(_taught(settings, name, before), start=From(stage=before), optimizer=rate)
    return replace(run, steps=train.generation_steps)


def best_of_n(settings) -> Config:
    """Likelihood of the likeliest of every n samples of the base, from the base."""
    n = settings.data.best
    run = _taught(settings, "best_of_n", "base", samples=n)
    prompts = _prompts(settings.data.predictable.bos, max(1, settings.train.rows // 2))
    best = Derived(partial(best_rows, n=n, by=_of_sampler))
    return replace(learning(run, batch="best"), data={"prompts": prompts}, derived={"best": best})


def distilled(settings) -> Config:
    """A fresh model takes over what kl_rl says at each state of its texts, KL(teacher‖student)."""
    train = settings.train
    rate = partial(adam, learning_rate=train.base_rate, final=0.01, steps=train.base_steps)
    run = learning(
        _taught(settings, "distilled", "kl_rl"),
        objective=distill,
        vocab=partial(distill_vocab, beta=0.0),
        scores=("teacher",),
        start=None,
        optimizer=rate,
    )
    return replace(run, steps=train.base_steps)


def _taught(settings, name, teacher, **rollouts):
    """Likelihood of samples of an earlier model, frozen."""
    run = kl_rl(settings, policy="teacher", reference=None, kl=NO_KL, **rollouts)
    frozen = {"teacher": Frozen(From("policy", stage=teacher), model_of(settings))}
    return replace(learning(run, objective=mle), name=name, frozen=frozen)


def _of_sampler(batch):
    """The log-probability of each text by who drew it."""
    return masked.sum(batch.logp, batch.mask, axis=1)


def learning(run: Config, **changes: Any) -> Config:
    """The same run, its policy another learner."""
    return replace(run, learners={"policy": replace(run.learners["policy"], **changes)})


def started(run: Config, name: str, stage: str) -> Config:
    """The same run from another base."""
    frozen = {"reference": replace(run.frozen["reference"], start=From("policy", stage=stage))}
    return replace(learning(run, start=From(stage=stage)), name=name, frozen=frozen)


def credited(run: Config, name: str, advantage: Callable) -> Config:
    """The same run with another advantage."""
    return replace(run, name=name, rollouts=replace(run.rollouts, advantage=advantage))


def _prompts(bos, rows):
    return partial(drawn, draw=partial(one_prompt, tokens=(bos,)), batch=rows)


def model_of(settings, *, tags: bool = False):
    """The model of the predictable toy's texts."""
    return replace(settings.model, vocab=settings.data.predictable.vocab + 2 * tags)


def near_sighted(model):
    """The same model, whose later positions do not teach earlier ones."""
    return replace(model, attention=myopic)
