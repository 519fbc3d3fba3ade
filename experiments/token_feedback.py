"""May one mark a bad token instead of comparing whole texts, and train on the mark without RL?

    rlhf-jax study experiments/token_feedback.py --preset cpu --out runs/token_feedback

A language model has learned that the capital lies in the right country seven times in ten, and in
a false one otherwise. An annotator who knows half of the cities marks the country of N sentences
good or bad, or says which of two sentences is better, N times. Ways of learning from marks are
compared with each other, with DPO on preferences, and with the optimum where there is a known one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tasks import facts_arms, facts_claims, facts_figure
from tasks.facts import Facts
from tasks.facts_curves import ENOUGH, labels_until, pace

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Claim, Settings, Study, Train


@dataclass(frozen=True)
class Sizes:
    """Sizes of the task, the labels, and the price of a nat."""

    task: Facts = Facts()
    labels: tuple[int, ...] = (25, 50, 100, 300)  # how many are compared
    usual: int = 300  # one of them: in every arm that is not about their number
    noise: float = 0.1  # share of wrong labels in the arms that have any
    beta: float = 0.25  # mark per nat, of horizon 1 and of RL
    dpo_beta: float = 0.3  # of preferences, with the likelihood of the preferred text
    plain_beta: float = 2.0  # of DPO alone
    base_steps: int = 600
    base_rows: int = 192
    base_rate: float = 5e-3


@dataclass(frozen=True)
class Feedback(Train):
    """`rows` are labels looked at in a step; RL draws `sampled` texts, `samples` of one city."""

    sampled: int = 96
    samples: int = 4


SMALL = Transformer(vocab=1, width=32, layers=1, heads=4, kv_heads=2, mlp=64, context=32)
CPU = Settings(SMALL, Sizes(), Feedback(steps=400, rows=64, rate=2e-3))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, width=16, mlp=32),
        Sizes(Facts(4, 2), labels=(4,), usual=4, base_steps=16, base_rows=16),
        Feedback(steps=4, rows=8, sampled=8),
        seeds=1,
        arms=("horizon_one_4", "dpo_4", "signed"),
    ),
    "cpu": CPU,
    "full": replace(CPU, data=Sizes(labels=(25, 50, 100, 300, 1000)), full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704),
        Sizes(Facts(200, 100), labels=(250, 800, 2500, 8000), usual=2500, base_steps=3000,
              base_rows=1024, base_rate=1e-3),
        Feedback(steps=2000, rows=256, rate=3e-4, sampled=1024),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408),
        Sizes(Facts(1000, 500), labels=(1250, 4000, 12500, 40000), usual=12500, base_steps=10000,
              base_rows=4096, base_rate=5e-4),
        Feedback(steps=5000, rows=1024, rate=1e-4, sampled=4096),
        full=True,
        together=False,
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """The arms under `settings`; the claims are the same at every size."""
    arms = facts_arms.everything(settings)
    return Study(
        name="token_feedback",
        question="Is it enough to mark bad tokens and train on the marks, without RL and without "
        "comparing whole texts, and which loss bears it?",
        bases={name: facts_arms.base(settings, name) for name in ("base", "late_base")},
        arms=arms,
        primaries=_primaries(settings),
        secondary=facts_claims.secondary(settings, tuple(arms)),
        measure=lambda trained: {},
        figure=partial(
            facts_figure.drawn,
            labels=settings.data.labels,
            usual=settings.data.usual,
            enough=ENOUGH,
        ),
        caption="Upper left: how often the model still names a wrong country where facts were "
        "marked, by number of labels (lines: means; dots: seeds, everywhere). Upper right: the "
        "log-probability of the false country while training (bands: least and most of the "
        "seeds). Lower left: how far all that nobody marked moved (strokes: means). Lower right: "
        "P(wrong) where marks may not reach: facts that nobody marked, and texts in which "
        "a later word decides.",
        seeds=settings.seeds,
        together=settings.together,
        larger="The closed form of horizon 1 holds at every size. How many labels a loss needs, "
        "and how much else it moves, depends on how much the facts share: see the panels on the "
        "left.",
    )


def _primaries(settings: Settings) -> tuple[Claim, ...]:
    """Stated before the eight seeds were run; theory decides P3 alone."""
    n = settings.data.usual
    most = settings.data.labels[-1]
    return (
        Claim(
            "P1",
            "marks on tokens need at most a third of the labels that preferences need: labels "
            f"until P(wrong) ≤ {ENOUGH} (interpolated; {settings.data.labels[0]} if at "
            f"once, {most} if never) of exact horizon 1 ÷ of DPO with "
            "the likelihood of the preferred text",
            lambda r: (
                labels_until(r, "horizon_one", settings.data.labels)
                / labels_until(r, "dpo", settings.data.labels)
            ),
            supported=(-np.inf, 1 / 3),
            possible=(-np.inf, 1 / 2),
            unit="ratio",
        ),
        Claim(
            "P2",
            "signed likelihood is badly behaved: its KL on all that was not marked ÷ that of exact "
            f"horizon 1, {n} marks, where the learning rates of both add up to the same (half of "
            "its steps; all of the other's)",
            lambda r: (
                r.values("collateral", "signed", settings.train.steps // 2)
                / r.values("collateral", f"horizon_one_{n}")
            ),
            supported=(3.0, np.inf),
            possible=(1.0, np.inf),
            unit="ratio",
        ),
        Claim(
            "P3",
            "exact horizon 1 ends at softmax(log π0 + r/β) on the base that was learned: KL to it, "
            "largest of the places",
            lambda r: r.vector("distance", f"horizon_one_{n}").max(axis=1),
            supported=(-np.inf, 1e-3),
            unit="nats",
        ),
        Claim(
            "P4",
            "where a word two places later decides, marks on it do not help, preferences do: "
            "P(wrong) of horizon 1 less that of preferences",
            lambda r: (
                r.values("wrong_known", "late_horizon_one") - r.values("wrong_known", "late_dpo")
            ),
            supported=(0.0, np.inf),
            unit="probability",
        ),
        Claim(
            "P5",
            "signed likelihood pushes a bad token down without end: log p(false) per step in the "
            "last half of training ÷ in the half before, at a constant rate",
            lambda r: pace(*r.curve("log_false", "signed")),
            supported=(0.5, np.inf),
            possible=(0.25, np.inf),
            unit="ratio",
        ),
        Claim(
            "P6",
            "a reward model that learned the marks does better than the marks themselves on facts "
            "that nobody marked: P(wrong) there of sampled horizon 1 on the one less on the other",
            lambda r: (
                r.values("wrong_other", "token_model_rl") - r.values("wrong_other", "table_rl")
            ),
            supported=(-np.inf, 0.0),
            unit="probability",
        ),
    )
