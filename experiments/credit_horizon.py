"""How far does credit reach, and which tokens does an estimator reward for nothing?

    rlhf-jax study experiments/credit_horizon.py --preset cpu --out runs/credit_horizon

Two toys. On a chain of three tokens the credit horizon h, the tokens that a reward is credited to,
decides where RL ends, and theory says where, on whatever base was learned. On texts of sixteen
tokens of which the fifth decides the reward, estimators differ in what they do to the other eleven.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tasks import credit_arms, credit_figure
from tasks.chain import Chain
from tasks.local import Local

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Claim, Settings, Study, Train
from rlhf_jax.study.results import Results
from rlhf_jax.study.statistics import farthest


@dataclass(frozen=True)
class Tasks:
    """Sizes of both toys, and what drifting from the base costs in both."""

    chain: Chain = Chain()
    local: Local = Local()
    beta: float = 0.5  # reward per nat
    base_steps: int = 300
    base_rows: int = 128
    base_rate: float = 5e-3
    samples: int = 2048  # of a policy on the long text, for one measure


@dataclass(frozen=True)
class Both(Train):
    """Steps are those of both toys."""

    local_rows: int = 64  # of one step's batch on the long text
    local_rate: float = 1e-2
    samples: int = 4  # per prompt there


SMALL = Transformer(vocab=1, width=32, layers=2, heads=4, kv_heads=2, mlp=64, context=64)
CPU = Settings(SMALL, Tasks(), Both(steps=400, rows=256, rate=3e-3))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, width=16, layers=1, mlp=32),
        Tasks(local=Local(8, 8, 3, 2), base_steps=20, base_rows=32, samples=256),
        Both(steps=8, rows=32, local_rows=16),
        seeds=1,
        arms=("final_h1", "gae"),
    ),
    "cpu": CPU,
    "full": replace(CPU, full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704, context=128),
        Tasks(Chain(8, 6), Local(64, 64, 20, 16), base_steps=2000, base_rows=512,
              base_rate=1e-3, samples=8192),
        Both(steps=2000, rows=2048, rate=5e-4, local_rows=512, local_rate=1e-3),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408, context=256),
        Tasks(Chain(16, 5), Local(256, 128, 40, 64), base_steps=5000, base_rows=2048,
              base_rate=5e-4, samples=8192),
        Both(steps=4000, rows=8192, rate=3e-4, local_rows=2048, local_rate=5e-4),
        full=True,
        together=False,
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """Both toys under `settings`: arms are the same everywhere, `full` has those of no primary."""
    return Study(
        name="credit_horizon",
        question="What do the credit horizon and the estimator of the advantage decide: where does "
        "RL end, and which tokens does it reward for nothing?",
        bases={f"{which}_base": credit_arms.base(settings, which) for which in ("chain", "local")},
        arms={**credit_arms.horizons(settings), **credit_arms.estimators(settings)},
        primaries=_primaries(settings),
        secondary=_secondary(settings),
        measure=lambda trained: {},
        figure=partial(credit_figure.figure, task=settings.data.local),
        caption="Left: how far each token's distribution moved from the base; black marks: where "
        "theory puts each horizon on the base that was learned. Right: the share of the policy "
        "gradient's power that falls on tokens which cannot matter. Bars and lines: means; "
        "whiskers and bands: least and most of the seeds.",
        seeds=settings.seeds,
        together=settings.together,
        larger="Horizons end where theory says at every size whose texts can be enumerated. What "
        "a learned critic wastes depends on its size, rate and steps: compare the right panel.",
    )


def _primaries(settings: Settings) -> tuple[Claim, ...]:
    """Stated before anything was run; theory decides all but P5."""
    task, quarter = settings.data.local, settings.train.steps // 4
    share = f"{task.length - task.place}/{task.length}"
    return (
        Claim(
            "P1",
            "paid at the end and credited to one token, a policy equals its base before the last "
            "token: the largest KL of those tokens",
            lambda r: r.vector("kl", "final_h1")[:, :-1].max(axis=1),
            supported=(-np.inf, 1e-3),
            unit="nats",
        ),
        Claim(
            "P2",
            "paid at the end, a longer horizon earns more at equal KL (read on the line from the "
            "base through the policy): the smaller of the gains from 1 to 2 tokens and from 2 to "
            "all",
            _gain,
            supported=(0.0, np.inf),
            unit="reward",
        ),
        Claim(
            "P3",
            "paid token by token, a horizon of 1 is sensible: what its E[r] − β KL lacks to the "
            "best there is",
            lambda r: r.values("best", "token_h1") - r.values("objective", "token_h1"),
            supported=(-np.inf, 0.03),
            unit="reward",
        ),
        Claim(
            "P4",
            f"REINFORCE rewards all tokens alike: the share of its power on the {share} that "
            "cannot matter, less that number, farthest from it over baselines and time",
            partial(_farthest, expected=task.behind),
            supported=(-0.08, 0.08),
            possible=(-0.15, 0.15),
            unit="share",
        ),
        Claim(
            "P5",
            "a learned critic does not mend that: its share (PPO, GAE 0.95) by a quarter of "
            "training ÷ that of leave-one-out",
            lambda r: (
                r.values("waste", "gae", quarter) / r.values("waste", "leave_one_out", quarter)
            ),
            supported=(0.9, np.inf),
            possible=(0.5, np.inf),
            unit="ratio",
        ),
        Claim(
            "P6",
            "a critic of returns of h tokens is 0 in states from which the end is farther: the "
            "largest mean |V| there, h = 1 and 2",
            _early_value,
            supported=(-np.inf, 0.02),
            unit="reward",
        ),
    )


def _secondary(settings: Settings) -> tuple[Claim, ...]:
    """Where theory puts every arm, and what shows that the primaries could have failed."""
    begin, quarter = 0, settings.train.steps // 4
    chains = tuple(credit_arms.horizons(settings))
    found = (
        Claim(
            "S1",
            "with a horizon of 1 the last token goes as far as theory says: its KL less that of "
            "the optimum on the same base",
            lambda r: (r.vector("kl", "final_h1") - r.vector("target_kl", "final_h1"))[:, -1],
            supported=(-0.03, 0.03),
            unit="nats",
        ),
        Claim(
            "S2",
            "all horizons end where theory says: the largest KL(policy‖optimum)",
            lambda r: np.max([r.values("distance", arm) for arm in chains], axis=0),
            supported=(-np.inf, 0.01),
            unit="nats",
        ),
        Claim(
            "S3",
            "control of P1: with credit for the whole text the tokens before the last do move",
            lambda r: r.vector("kl", "final_whole")[:, :-1].max(axis=1),
            supported=(0.1, np.inf),
            unit="nats",
        ),
        Claim(
            "S4",
            "control of P6: with credit for the whole text the critic expects something from the "
            "first state on, |V|",
            lambda r: r.vector("value", "final_whole")[:, 0],
            supported=(0.5, np.inf),
            unit="reward",
        ),
        Claim(
            "S5",
            "token by token with a horizon of 1 needs fewer episodes than paid at the end with "
            "credit for all, up to 90 % of what E[r] − β KL can gain: their difference",
            lambda r: _episodes(r, "final_whole", settings) - _episodes(r, "token_h1", settings),
            supported=(0.0, np.inf),
            unit="episodes",
        ),
        Claim(
            "S6",
            "before it has learned, a critic makes it worse: share of PPO less that of "
            "leave-one-out at the start",
            lambda r: r.values("waste", "gae", begin) - r.values("waste", "leave_one_out", begin),
            supported=(0.0, np.inf),
            unit="share",
        ),
        Claim(
            "S7",
            "P5 at the end of training",
            lambda r: r.values("waste", "gae") / r.values("waste", "leave_one_out"),
            supported=(0.9, np.inf),
            unit="ratio",
        ),
        Claim(
            "S8",
            "waste costs: cosine of one step's gradient to the exact one by a quarter of training, "
            "true advantages less leave-one-out",
            partial(_cosines, arm="leave_one_out", step=quarter),
            supported=(0.0, np.inf),
            unit="cosine",
        ),
        Claim(
            "S9",
            "leave-one-out of k, where a share p of texts is paid, has k (1 − p)/(k − 1) of the "
            "power of no baseline: 1 for k = 4 and p = ¼; the ratio of both at the start",
            partial(_power, samples=settings.train.samples),
            supported=(0.9, 1.1),
            unit="ratio",
        ),
        Claim(
            "S10",
            "less waste pays: E[r] − β KL at the end, PPO with a critic less leave-one-out",
            lambda r: _objective(r, "gae", settings) - _objective(r, "leave_one_out", settings),
            supported=(0.0, np.inf),
            unit="reward",
        ),
    )
    return found + _of_all_arms(quarter) if settings.full else found


def _of_all_arms(quarter: int) -> tuple[Claim, ...]:
    """What only the arms that no primary needs can say."""

    def waste(arm):
        return lambda r: (
            r.values("waste", arm, quarter) / r.values("waste", "leave_one_out", quarter)
        )

    return (
        Claim(
            "S11",
            "with KL in the return a horizon of 2 is felt before its window: KL of the first token",
            lambda r: r.vector("kl", "final_h2_return")[:, 0],
            supported=(1e-3, np.inf),
            unit="nats",
        ),
        Claim(
            "S12",
            "P5 with λ = 0, which asks the critic for everything",
            waste("gae_0"),
            supported=(0.9, np.inf),
            unit="ratio",
        ),
        Claim(
            "S13",
            "P5 with λ = 1, where the critic is a baseline only",
            waste("gae_1"),
            supported=(0.9, np.inf),
            unit="ratio",
        ),
        Claim(
            "S14",
            "control of P4: a baseline that knows the values wastes nothing, at any time",
            lambda r: r.curve("waste", "oracle")[1].max(axis=1),
            supported=(-np.inf, 1e-3),
            unit="share",
        ),
    )


def _episodes(results: Results, arm: str, settings: Settings) -> np.ndarray:
    """Texts sampled until E[r] − β KL has gained 90 % of what it can; the end if it never has."""
    steps, found = results.curve("objective", arm)
    start, best = results.values("start", arm), results.values("best", arm)
    there = (found - start[:, None]) / (best - start)[:, None] >= 0.9
    first = np.where(there.any(axis=1), there.argmax(axis=1), len(steps) - 1)
    return 1.0 * steps[first] * settings.train.rows


def _objective(results: Results, arm: str, settings: Settings) -> np.ndarray:
    return results.values("reward", arm) - settings.data.beta * results.values("kl", arm)


def _power(results: Results, *, samples: int) -> np.ndarray:
    """Var(R − mean of k − 1 others)/E R² = k (1 − p)/(k − 1) for R of 0 or 1: measured ÷ that."""
    none, rest = (results.vector("power", a, 0).sum(axis=1) for a in ("none", "leave_one_out"))
    return rest / none / (samples / (samples - 1) * (1 - results.values("reward", "none", 0)))


def _cosines(results: Results, *, arm: str, step: int) -> np.ndarray:
    return results.values("oracle_cosine", arm, step) - results.values("cosine", arm, step)


def _gain(results: Results) -> np.ndarray:
    """The smallest gain in reward, at the KL of a horizon of 1, from one horizon to the next."""
    arms = ("final_h1", "final_h2", "final_whole")
    return np.diff([results.values("level", arm) for arm in arms], axis=0).min(axis=0)


def _farthest(results: Results, *, expected: float) -> np.ndarray:
    """Of the arms without a critic, at all times, the deviation that is largest in size."""
    arms = ("none", "mean", "leave_one_out")
    return farthest(*(results.curve("waste", arm)[1] - expected for arm in arms))


def _early_value(results: Results) -> np.ndarray:
    """The largest E|V| of a state with more than h tokens to come."""
    early = [results.vector("value", f"final_h{h}")[:, :-h] for h in (1, 2)]
    return np.concatenate(early, axis=1).max(axis=1)
