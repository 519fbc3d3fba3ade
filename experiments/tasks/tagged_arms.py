"""The runs of `control_tokens`: RL with and without a gate, conditioning, and partial fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf_jax import advantages
from rlhf_jax.aggregate import over_sequences
from rlhf_jax.conditioning import batch_edges, called_good, chained, condition, untagged
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.objectives import (
    above_value,
    combine,
    gated,
    mle,
    quark,
    quark_vocab,
    reference_kl_vocab,
    reinforce,
    score_value,
    weighted_regression,
)
from rlhf_jax.returns_to_go import returns_to_go
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling
from rlhf_jax.selection import above, with_score
from rlhf_jax.study import Settings, Train
from tasks import tagged, tagged_exact
from tasks.tagged import TAGS, Letters, sized

BETA = 0.5  # price of a nat where the reward is r; where it is log σ(r) the price is 1
ANCHOR = 1.0  # price of a nat behind OFF, where the arm has one
SAMPLES = 8  # of a prompt, each the others' baseline
HALVES = {"tags": ("ON", "OFF"), "shares": (0.5, 0.5)}
RARE = {"tags": ("ON", "OFF"), "shares": (0.9, 0.1)}
BINS = ("BIN0", "BIN1", "BIN2", "BIN3")


@dataclass(frozen=True)
class TrainTagged(Train):
    """How long and how fast; `steps` and `rows` are of samples."""

    texts: int = 256  # of a step that learns from given ones
    text_steps: int = 800  # of that; where tags part texts, twice as many of twice as many


def run(
    name: str,
    settings: Settings,
    *,
    learner: Learner,
    rollouts: Rollouts | None = None,
    tags: tuple[str, ...] = (),
    shares: tuple[float, ...] = (1.0,),
    texts: int = 1,
    base: str = "base",
    **options: Any,
) -> Config:
    """A run that starts from a base, whose frozen copy is called reference.

    It learns from its rollouts or, without them, from texts of the chain: `train.texts` of them for
    `train.text_steps`, both times `texts`.
    """
    train, task, start = settings.train, settings.data, From("policy", stage=base)
    steps = texts * train.text_steps if rollouts is None else train.steps
    tune = {"learning_rate": train.rate, "final": 0.0, "steps": steps}
    learner = replace(
        learner, optimizer=partial(learner.optimizer, **tune), start=learner.start or start
    )
    if rollouts is None:
        draw = partial(tagged.texts, task=task)
        data = {"text": partial(drawn, draw=draw, batch=texts * train.texts)}
    else:
        draw = partial(tagged.asked, task=task, tags=tags, shares=shares)
        data = {"prompts": partial(drawn, draw=draw, batch=train.rows // SAMPLES)}
        rollouts = replace(
            rollouts,
            length=task.length,
            samples=SAMPLES,
            sampling=Sampling(banned=task.tags(*TAGS)),  # of which the model knows nothing to say
            value=None,
            show=0,
        )
    reference = {"reference": Frozen(start, sized(settings.model, task))}
    return Config(
        name=name,
        steps=steps,
        data=data,
        learners={"policy": learner},
        frozen=reference | options.pop("frozen", {}),
        rollouts=rollouts,
        mesh=settings.mesh,
        **options,
    )


def reinforced(
    name: str,
    settings: Settings,
    *,
    reward: Callable = tagged.gold,
    beta: float = BETA,
    anchor: float | None = None,
    flips: bool = False,
    **asked: Any,
) -> Config:
    """REINFORCE, the KL penalty `beta` in the reward; with a gate and its anchor, or without.

    At the optimum every sample of a prompt earns the same, β log Z, so that its noise vanishes.
    """
    task, learner = settings.data, Learner(sized(settings.model, settings.data), reinforce)
    if anchor is not None:
        objective = partial(
            gated,
            objective=reinforce,
            on=task.tag("ON"),
            off=task.tag("OFF"),
            on_coefficient=0.0,  # the reward has the penalty
            off_coefficient=anchor,
            aggregate=over_sequences,
        )
        learner = replace(
            learner, objective=objective, vocab=reference_kl_vocab, scores=("reference",)
        )
    rollouts = Rollouts(
        partial(reward, task=task),
        length=1,
        environment=tagged.switched(task) if flips else None,
        reference="reference" if beta else None,
        kl=KL(beta, adaptive=False),
        advantage=advantages.leave_one_out,
    )
    return run(name, settings, learner=learner, rollouts=rollouts, **asked)


def taught(
    name: str,
    settings: Settings,
    objective: Callable = mle,
    *,
    transform: Callable,
    model: Letters | None = None,
    texts: int = 1,
) -> Config:
    """Learning from texts of the chain, with what they earn."""
    model = sized(settings.model, settings.data) if model is None else model
    learner = Learner(model, objective, "text", transform=transform)
    return run(name, settings, learner=learner, texts=texts)


def resampled(
    name: str,
    settings: Settings,
    objective: Callable = mle,
    *,
    tag: str,
    sampler: str = "policy",
    **options: Any,
) -> Config:
    """Learning from samples behind a tag, of the policy or another, and from what they earn."""
    task = settings.data
    frozen = options.pop("frozen", {})
    learner = Learner(sized(settings.model, task), objective, "samples", **options)
    rollouts = Rollouts(
        partial(tagged.gold, task=task),
        length=1,
        policy=sampler,
        reference=None,
        kl=KL(0.0, adaptive=False),
    )
    derived = {"samples": Derived(with_score)}
    return run(
        name, settings, learner=learner, rollouts=rollouts, tags=(tag,), derived=derived,
        frozen=frozen,
    )  # fmt: skip


# ---- of the study


def off_token(settings: Settings) -> dict[str, Config]:
    """RL behind ON; behind OFF nothing, an anchor, or what a coin says."""
    rl = partial(reinforced, settings=settings)
    found = {
        "anchored": rl("anchored", anchor=ANCHOR, **HALVES),
        "gate": rl("gate", tags=("ON",)),
        "scrambled": rl("scrambled", reward=partial(tagged.by_a_coin, period=2), **HALVES),
    }
    if settings.full:
        found |= {
            "untagged": rl("untagged"),
            "ignored": rl("ignored", anchor=0.0, **HALVES),
            "ignored_tenth": rl("ignored_tenth", anchor=0.0, **RARE),
            "anchored_tenth": rl("anchored_tenth", anchor=ANCHOR, **RARE),
            "flipped": rl("flipped", anchor=ANCHOR, flips=True),
        }
    return found


def conditioned(settings: Settings) -> dict[str, Config]:
    """Ways to good text: asked for by a tag, weighed, filtered, rewarded."""
    task = settings.data
    learn, rl = partial(taught, settings=settings), partial(reinforced, settings=settings)
    tags = partial(learn, texts=2)
    words = partial(condition, edges=(0.5,), tags=task.tags("BAD", "GOOD"))
    weighed = partial(weighted_regression, beta=1.0)
    found = {
        "condition": tags("condition", transform=in_turn(tagged.people_say, kept(words, 0.1))),
        "weighted": learn("weighted", objective=weighed, transform=tagged.log_called_good),
        "kl_rl": rl("kl_rl", reward=tagged.log_good, beta=1.0),
        "no_kl": rl("no_kl", reward=tagged.log_good, beta=0.0),
    }
    if not settings.full:
        return found
    edges = tagged_exact.quantiles(task, (0.25, 0.5, 0.75))
    bins = partial(condition, tags=task.tags(*BINS))
    anew = partial(bins, edges=partial(batch_edges, parts=4), drop=0.0)
    first = From("policy", stage="condition")
    return found | {
        "condition_rarely_dropped": tags(
            "condition_rarely_dropped", transform=in_turn(tagged.people_say, kept(words, 0.01))
        ),
        "condition_crisp": tags(
            "condition_crisp", transform=kept(partial(words, edges=edges[2:]), 0.1)
        ),
        "second_round": resampled(
            "second_round",
            settings,
            tag="GOOD",
            sampler="sampler",
            transform=in_turn(
                partial(untagged, tags=task.tags("GOOD")), called_good, partial(words, drop=0.0)
            ),
            start=first,
            frozen={"sampler": Frozen(first, sized(settings.model, task))},
        ),
        "quantiles": tags("quantiles", transform=kept(partial(bins, edges=edges), 0.1)),
        "quark": resampled(
            "quark",
            settings,
            partial(quark, coefficient=0.05),
            tag="BIN3",
            transform=in_turn(partial(untagged, tags=task.tags(*BINS)), anew),
            vocab=quark_vocab,
            scores=("reference",),
        ),
        "returns": tags(
            "returns",
            transform=partial(returns_to_go, edges=edges, tags=task.tags(*BINS), drop=0.1),
        ),
        "advantage_weighted": learn(
            "advantage_weighted",
            objective=partial(
                combine,
                policy=partial(weighed, advantage=above_value),
                value=partial(score_value, coefficient=0.5),
            ),
            transform=tagged.log_called_good,
            model=sized(settings.model, task, value_head=True),
        ),
        "filtered": learn("filtered", transform=partial(above, threshold=edges[2])),
    }


def in_turn(*transforms: Callable) -> Callable:
    """Transforms one after another."""
    return partial(chained, transforms=transforms)


def kept(transform: Callable, drop: float) -> Callable:
    """A transform that tags, but every 1/`drop`-th row."""
    return partial(tagged.dropped, tagged=transform, drop=drop)
