"""The arms of `world_prior.py`: what moves a language model towards one of its worlds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rlhf_jax import advantages
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.objectives import mle, reinforce
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.selection import best_rows
from rlhf_jax.study import Arm, Settings
from tasks import prior, prior_measures
from tasks.likelihood import likelihood

BETAS = {"rl_0": 0.0, "rl_02": 0.02}  # reward per nat; more of them in `full`
ALL_BETAS = {"rl_0": 0.0, "rl_005": 0.005, "rl_02": 0.02, "rl_08": 0.08}
RISING = tuple((i / 10) ** 2 for i in range(10))  # of supervision
SOON = tuple(i / 150 for i in (0, 1, 2, 3, 4, 5, 7, 10, 20, 50, 100))  # of RL, whose rate is higher
CORPORA = {"sft_100_texts": 100, "sft_2000_texts": 2000}


def bases(settings: Settings) -> dict[str, Config]:
    """Models of the worlds, by likelihood: the prior as it is, and the wanted world at `moved`."""
    task = settings.data.task
    found = {"base": task.worlds, "reweighted_base": task.reweighted}
    return {name: _pretrained(settings, name, worlds) for name, worlds in found.items()}


def _pretrained(settings: Settings, name: str, worlds) -> Config:
    sizes, task = settings.data, settings.data.task
    rate = partial(
        adam, learning_rate=sizes.base_rate, final=0.01, steps=sizes.base_steps, warmup=20
    )
    draw = partial(prior.texts, worlds=worlds, length=task.length)
    return likelihood(
        name, _model(settings), draw, steps=sizes.base_steps, rows=sizes.base_rows,
        optimizer=rate, mesh=settings.mesh,
    )  # fmt: skip


def _model(settings: Settings):
    return replace(settings.model, vocab=settings.data.task.worlds.vocab)


def arms(settings: Settings) -> dict[str, Arm]:
    """Fine-tuning on texts of the wanted world, pretraining with more of it, and RL towards it."""
    sizes, task, model = settings.data, settings.data.task, _model(settings)
    measure = partial(prior_measures.policy, sizes=sizes)
    anew = "reweighted_base"
    found = {
        "reweighted": Arm(
            partial(prior_measures.pretrained, model=model, sizes=sizes, source=anew),
            f"pretrained anew, {task.moved:.0%} of its texts' tokens from the wanted world",
            needs=("base", anew),
        ),
        "sft": Arm(
            _sft(settings, "sft", partial(prior.texts, worlds=task.alone, length=task.length)),
            "supervised on texts of the wanted world alone",
            looks(sizes.sft_steps, RISING),
            partial(measure, first=True, target=anew),
            needs=(anew,),
        ),
    }
    for name, beta in (ALL_BETAS if settings.full else BETAS).items():
        says = f"RL for the wanted world's tokens, {f'β = {beta}' if beta else 'no KL penalty'}"
        at = looks(settings.train.steps, SOON)
        found[name] = Arm(_rl(settings, name, beta), says, at, partial(measure, beta=beta))
    if settings.full:
        for name, count in CORPORA.items():
            draw = partial(prior.documents, worlds=task.alone, length=task.length, count=count)
            run = _sft(settings, name, draw)
            found[name] = Arm(
                run, f"supervised on {count} such texts", looks(run.steps, RISING), measure
            )
        run = _filtered(settings)
        says = "supervised on the best quarter of the base's own texts"
        found["filtered"] = Arm(run, says, looks(run.steps, RISING), measure)
    return found


def looks(steps: int, parts: tuple[float, ...]) -> tuple[int, ...]:
    """Where measures are taken, as parts of a run: where most happens, and arms are compared."""
    return tuple(sorted({round(steps * part) for part in parts}))


def _learner(settings: Settings, rate: float, steps: int, objective, **more) -> Learner:
    schedule = partial(adam, learning_rate=rate, final=0.05, steps=steps)
    return Learner(
        _model(settings), objective, optimizer=schedule, start=From(stage="base"), **more
    )


def _sft(settings: Settings, name: str, draw) -> Config:
    sizes = settings.data
    rate = partial(adam, learning_rate=sizes.sft_rate, final=0.05, steps=sizes.sft_steps)
    return likelihood(
        name, _model(settings), draw, steps=sizes.sft_steps, rows=sizes.sft_rows, optimizer=rate,
        start=From(stage="base"), mesh=settings.mesh,
    )  # fmt: skip


def _rl(settings: Settings, name: str, beta: float) -> Config:
    task, train = settings.data.task, settings.train
    return Config(
        name=name,
        steps=train.steps,
        data={"prompts": partial(drawn, draw=_start(task), batch=train.rows)},
        learners={"policy": _learner(settings, train.rate, train.steps, reinforce)},
        frozen={"reference": Frozen(From("policy", stage="base"), _model(settings))},
        rollouts=Rollouts(
            partial(prior.by_token, task=task),
            length=task.length,
            value=None,
            kl=KL(beta, adaptive=False),
            advantage=partial(advantages.centred, advantage=advantages.reward_to_go),
            show=0,
        ),
        mesh=settings.mesh,
    )


def _filtered(settings: Settings) -> Config:
    """The base writes, the best quarter is learned: no policy gradient, the same reward."""
    task, sizes = settings.data.task, settings.data
    rows, steps = 4 * sizes.sft_rows, 2 * sizes.sft_steps
    run = _rl(settings, "filtered", 0.0)
    spec = replace(
        run.rollouts, policy="reference", reference=None, advantage=advantages.reward_to_go,
        samples=rows,
    )  # fmt: skip
    best = partial(best_rows, n=rows, keep=rows // 4)
    return replace(
        run,
        steps=steps,
        data={"prompts": partial(drawn, draw=_start(task), batch=1)},
        learners={"policy": _learner(settings, sizes.sft_rate, steps, mle, batch="best")},
        rollouts=spec,
        derived={"best": Derived(best)},
    )


def _start(task: prior.Prior):
    return partial(prior.start, worlds=task.worlds)
