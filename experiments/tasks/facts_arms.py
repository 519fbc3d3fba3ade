"""The arms of `token_feedback.py`: marks on tokens, preferences between sentences, and RL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_jax import advantages
from rlhf_jax.aggregate import over_sequences
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.objectives import (
    combine,
    cringe,
    cringe_vocab,
    dpo,
    horizon_one,
    horizon_one_vocab,
    mle,
    ppo,
    reference_kl,
    reference_kl_vocab,
    reinforce,
    reward_model,
    signed_likelihood,
    token_npo,
    token_reward_model,
    unlikelihood,
    value,
)
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model
from rlhf_jax.study import Arm, Settings
from tasks import facts, facts_measures
from tasks.facts import VERDICT
from tasks.facts_rewards import by_scorer, by_table, preferred
from tasks.likelihood import likelihood

EPOCHS = 4  # of PPO


def base(settings: Settings, name: str) -> Config:
    """A language model of the sentences; `late_base` of those with a word that decides."""
    sizes, task = settings.data, settings.data.task
    draw = partial(facts.texts, task=task, late=name == "late_base")
    rate = partial(adam, learning_rate=sizes.base_rate, final=0.02, steps=sizes.base_steps)
    return likelihood(
        name, task.model(settings.model), draw, steps=sizes.base_steps, rows=sizes.base_rows,
        optimizer=rate, mesh=settings.mesh,
    )  # fmt: skip


def everything(settings: Settings) -> dict[str, Arm]:
    """All arms; those that no primary needs only if the settings say `full`."""
    beta, usual = settings.data.beta, settings.data.usual
    exact = {
        "objective": partial(horizon_one, kl_coefficient=beta),
        "vocab": horizon_one_vocab,
        "scores": ("reference",),
    }
    rest = {"objective": partial(unlikelihood, threshold=0.0)}
    pairs = _preferences(settings)
    over = partial(_learned, settings)
    found = {}
    for n in settings.data.labels:
        found[f"horizon_one_{n}"] = over(
            f"horizon 1, exact, {n} marks", labels=n, look=n == usual, beta=beta, **exact
        )
        found[f"dpo_{n}"] = over(
            f"DPO with the likelihood of the preferred text, {n} preferences",
            labels=n, look=n == usual, **pairs,
        )  # fmt: skip
    signed = {"objective": signed_likelihood, "final": 1.0}
    found["signed"] = over("signed likelihood, at a constant rate", look=True, **signed)
    found["unlikelihood"] = over("unlikelihood", look=True, **rest)
    found["dpo_plain"] = over(
        f"DPO alone, {usual} preferences", look=True, **_preferences(settings, plain=True)
    )
    found |= _second_hand(settings)
    late = partial(over, late=True)
    found["late_horizon_one"] = late("horizon 1, marks on the country, decided later", **exact)
    found["late_dpo"] = late("preferences, decided later", **pairs)
    if settings.full:
        found |= _others(settings, over, exact=exact, rest=rest, pairs=pairs, signed=signed)
    return found


def _preferences(settings: Settings, *, plain: bool = False) -> dict[str, Any]:
    """What learns from comparisons; each way with what did best on two other seeds.

    Alone, DPO takes from the false country and gives to all others; the likelihood of the preferred
    text keeps the right one (Pang et al. 2024, with their weight 1). With it both sentences speak
    of one city, so that no coin decides between true ones; alone it does worse on those.
    """
    strength = settings.data.plain_beta if plain else settings.data.dpo_beta
    apart = partial(dpo, beta=strength)
    both = partial(combine, preference=apart, likelihood=preferred)
    return {
        "objective": apart if plain else both, "scores": ("reference",), "make": facts.compared,
        "same": not plain,
    }  # fmt: skip


def _second_hand(settings: Settings) -> dict[str, Arm]:
    """Sampled horizon 1, paid by the marks themselves or by a reward model that learned them."""
    judge, task = _judge(settings), settings.data.task
    return {
        "table_rl": _reinforced(
            settings,
            "horizon 1, sampled, on the mean marks",
            partial(by_table, task=task, count=settings.data.usual),
        ),
        "token_model": _scorer(settings, token_reward_model, facts.marked),
        "token_model_rl": _reinforced(
            settings,
            "horizon 1, sampled, on a reward model of tokens",
            partial(by_scorer, model=judge),
            scorer="token_model",
        ),
    }


def _others(settings, over, *, exact, rest, pairs, signed) -> dict[str, Arm]:
    """Arms that no primary needs: wrong marks, one city in a pair, tags, more RL."""
    noise = settings.data.noise
    found = {
        f"{name}_noisy": over(f"{says}, {noise:.0%} of the labels wrong", noise=noise, **which)
        for name, says, which in (
            ("horizon_one", "horizon 1, exact", exact), ("unlikelihood", "unlikelihood", rest),
            ("signed", "signed likelihood", signed), ("dpo", "preferences", pairs),
        )
    }  # fmt: skip
    found["late_moved"] = over(
        "horizon 1, marks on the word that decides", late=True, at=VERDICT, **exact
    )
    found["npo"] = over(
        "token NPO", look=True, objective=partial(token_npo, threshold=0.0), scores=("reference",)
    )
    found["cringe"] = over(
        "CRINGE", look=True, objective=partial(cringe, threshold=0.0), vocab=cringe_vocab
    )
    found["dpo_mixed"] = over(
        "preferences between sentences about any two cities", **pairs | {"same": False}
    )
    found["tags"] = over("a word for each mark, asked for GOOD", objective=mle, make=facts.tagged,
                         tag="GOOD")  # fmt: skip
    marks = partial(by_table, task=settings.data.task, count=settings.data.usual)
    found["table_whole"] = _reinforced(
        settings, "token rewards, whole horizon, on the mean marks", marks, whole=True
    )
    found["sequence_model"] = _scorer(settings, reward_model, facts.compared)
    found["ppo"] = _reinforced(
        settings, "PPO on a reward model of sentences",
        partial(from_model, model=_judge(settings), learner="scorer"), whole=True,
        scorer="sequence_model", critic=True,
    )  # fmt: skip
    return found


def _learned(
    settings: Settings,
    says: str,
    *,
    objective: Callable,
    make: Callable = facts.marked,
    labels: int | None = None,
    look: bool = False,
    final: float = 0.0,
    beta: float | None = None,
    tag: str | None = None,
    late: bool = False,
    vocab: Callable | None = None,
    scores: tuple[str, ...] = (),
    **how: Any,
) -> Arm:
    """Learning from a fixed set of labels; measured on the way if one is to `look`."""
    task, train = settings.data.task, settings.train
    start, model = From(stage="late_base" if late else "base"), task.model(settings.model)
    given = {**how, "late": True} if late else how
    labels = settings.data.usual if labels is None else labels
    rate = partial(adam, learning_rate=train.rate, final=final, steps=train.steps, clip=None)
    learner = Learner(
        model, objective, batch="feedback", optimizer=rate, vocab=vocab, scores=scores, start=start
    )
    run = Config(
        name=says,
        steps=train.steps,
        data={"looks": partial(drawn, draw=facts.looks, batch=train.rows)},
        derived={"feedback": _feedback(make, task, labels, given)},
        learners={"policy": learner},
        frozen={"reference": Frozen(start, model)},
        mesh=settings.mesh,
    )
    if late:
        return Arm(run, says, (0,), partial(facts_measures.late_effects, task=task))
    at = tuple(sorted({train.steps * i // 16 for i in range(16)})) if look else (0,)
    return Arm(run, says, at, partial(facts_measures.effects, task=task, tag=tag, beta=beta))


def _feedback(make, task, labels, how) -> Derived:
    made = partial(make, task=task, count=labels, **how)
    return Derived(made, of=("looks",), models=("reference",))


def _judge(settings):
    return settings.data.task.model(settings.model, lm_head=False, value_head=True)


def _scorer(settings: Settings, objective: Callable, make: Callable) -> Arm:
    """A reward model that starts from the base."""
    task, train, start = settings.data.task, settings.train, From(stage="base")
    rate = partial(adam, learning_rate=train.rate, final=0.0, steps=train.steps)
    labels = settings.data.usual
    learner = Learner(_judge(settings), objective, batch="feedback", optimizer=rate, start=start)
    of = "tokens, from marks" if make is facts.marked else "sentences, from preferences"
    run = Config(
        name=f"a reward model of {of}",
        steps=train.steps,
        data={"looks": partial(drawn, draw=facts.looks, batch=train.rows)},
        derived={"feedback": _feedback(make, task, labels, {})},
        learners={"scorer": learner},
        frozen={"reference": Frozen(start, task.model(settings.model))},
        mesh=settings.mesh,
    )
    return Arm(run, run.name, measure=partial(facts_measures.insight, task=task))


def _reinforced(
    settings: Settings,
    says: str,
    reward: Callable,
    *,
    whole: bool = False,
    critic: bool = False,
    scorer: str | None = None,
) -> Arm:
    """RL on sentences about all cities; KL is a loss of each token, or with `whole` a reward."""
    task, train, beta = settings.data.task, settings.train, settings.data.beta
    model, start = task.model(settings.model), From(stage="base")
    epochs = EPOCHS if critic else 1
    rate = partial(adam, learning_rate=train.rate, final=0.0, steps=train.steps * epochs)
    common = {"optimizer": rate, "start": start, "epochs": epochs}
    policy = partial(ppo, aggregate=over_sequences) if critic else reinforce
    if whole:
        learners = {"policy": Learner(model, policy, **common)}
        credit = advantages.leave_one_out
    else:
        price = partial(reference_kl, coefficient=beta, aggregate=over_sequences)
        both = partial(combine, policy=policy, kl=price)
        fields = {"vocab": reference_kl_vocab, "scores": ("reference",)}
        learners = {"policy": Learner(model, both, **fields, **common)}
        credit = partial(advantages.credit_horizon, horizon=1)
    frozen = {"reference": Frozen(start, model)}
    if critic:
        judge, credit = _judge(settings), partial(advantages.gae, trace=0.95)
        learners["critic"] = Learner(judge, partial(value, clip=None), **common)
    if scorer is not None:
        frozen["scorer"] = Frozen(From("scorer", stage=scorer), _judge(settings))
    run = Config(
        name=says,
        steps=train.steps,
        data={
            "prompts": partial(
                drawn, draw=partial(facts.asked, task=task), batch=train.sampled // train.samples
            )
        },
        learners=learners,
        frozen=frozen,
        rollouts=Rollouts(
            reward, length=6, samples=train.samples, kl=KL(beta * whole, adaptive=False), show=0,
            reference="reference" if whole else None, value="critic" if critic else None,
            advantage=credit,
        ),
        mesh=settings.mesh,
    )  # fmt: skip
    return Arm(run, says, (0,), partial(facts_measures.effects, task=task))
