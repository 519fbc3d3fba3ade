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
from tasks import facts_arms, facts_figure
from tasks.facts import Facts
from tasks.facts_curves import ENOUGH, labels_until, line, pace

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Claim, Settings, Study, Train
from rlhf_jax.study.results import Results

FORGOTTEN = 0.02  # P(wrong) whose first step is compared


@dataclass(frozen=True)
class Sizes:
    """Sizes of the task, the labels, and the price of a nat."""

    task: Facts = Facts()
    labels: tuple[int, ...] = (30, 100, 300)  # the third is that of all other questions
    noise: float = 0.1  # share of wrong labels in the arms that have any
    beta: float = 0.25  # mark per nat, of horizon 1 and of RL
    dpo_beta: float = 0.1
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
        Sizes(Facts(4, 2), labels=(4,), base_steps=16, base_rows=16),
        Feedback(steps=4, rows=8, sampled=8),
        seeds=1,
    ),
    "cpu": CPU,
    "full": replace(CPU, full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704),
        Sizes(Facts(200, 100), labels=(250, 800, 2500, 8000), base_steps=3000, base_rows=1024,
              base_rate=1e-3),
        Feedback(steps=2000, rows=256, rate=3e-4, sampled=1024),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408),
        Sizes(Facts(1000, 500), labels=(1250, 4000, 12500, 40000), base_steps=10000,
              base_rows=4096, base_rate=5e-4),
        Feedback(steps=5000, rows=1024, rate=1e-4, sampled=4096),
        full=True,
        together=False,
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """The arms under `settings`; the claims are the same at every size."""
    return Study(
        name="token_feedback",
        question="Is it enough to mark bad tokens and train on the marks, without RL and without "
        "comparing whole texts, and which loss bears it?",
        bases={name: facts_arms.base(settings, name) for name in ("base", "late_base")},
        arms=facts_arms.everything(settings),
        primaries=_primaries(settings),
        secondary=_secondary(settings),
        measure=lambda trained: {},
        figure=partial(
            facts_figure.drawn,
            labels=settings.data.labels,
            usual=facts_arms.usual_labels(settings),
            enough=ENOUGH,
        ),
        caption="Upper left: how often the model still names a wrong country, by number of labels "
        "(lines: means; dots: seeds). Upper right: the log-probability of the false country while "
        "training on marks. Lower left: what moved that nobody marked. Lower right: what a reward "
        "model changes about facts that nobody marked, and what is left of token marks where a "
        "later word decides.",
        seeds=settings.seeds,
        together=settings.together,
        larger="The closed form of horizon 1 holds at every size. How many labels a loss needs, "
        "and how much else it moves, depends on how much the facts share: compare left and right.",
    )


def _primaries(settings: Settings) -> tuple[Claim, ...]:
    """Stated before anything was run; theory decides P3 alone."""
    n = facts_arms.usual_labels(settings)
    most = settings.data.labels[-1]
    return (
        Claim(
            "P1",
            "marks on tokens need at most a third of the labels: labels until P(wrong) ≤ "
            f"{ENOUGH} (interpolated; {most} if never) of exact horizon 1 ÷ of DPO",
            lambda r: (
                labels_until(r, "horizon_one", settings.data.labels)
                / labels_until(r, "dpo", settings.data.labels)
            ),
            supported=(-np.inf, 1 / 3),
            possible=(-np.inf, 1.0),
            unit="ratio",
        ),
        Claim(
            "P2",
            f"signed likelihood is badly behaved: KL of all that was not marked ÷ that of exact "
            f"horizon 1, {n} marks",
            lambda r: r.values("collateral", "signed") / r.values("collateral", f"horizon_one_{n}"),
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
            "where a word two places later decides, marks on the token lose their advantage: "
            "P(wrong) of horizon 1 less that of DPO",
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
            supported=(0.5, 2.0),
            possible=(0.25, 4.0),
            unit="ratio",
        ),
        Claim(
            "P6",
            "a reward model of tokens does better than the marks themselves on facts that nobody "
            "marked: P(wrong) there of horizon 1 on it less that of horizon 1 on the marks",
            lambda r: (
                r.values("wrong_other", "token_model_rl")
                - r.values("wrong_other", f"horizon_one_{n}")
            ),
            supported=(-np.inf, 0.0),
            unit="probability",
        ),
    )


def _secondary(settings: Settings) -> tuple[Claim, ...]:
    """What each arm leaves, costs and takes."""
    n = facts_arms.usual_labels(settings)
    usual = {
        "horizon 1": f"horizon_one_{n}",
        "unlikelihood": "unlikelihood",
        "signed likelihood": "signed",
        "DPO": f"dpo_{n}",
    }
    others = {"token NPO": "npo", "CRINGE": "cringe", "tags": "tags", "PPO": "ppo",
              "horizon 1, a mark on every sample": "online_horizon_one",
              "whole horizon, a mark on every sample": "online_whole",
              "horizon 1, noise": "horizon_one_noisy", "unlikelihood, noise": "unlikelihood_noisy",
              "signed likelihood, noise": "signed_noisy", "DPO, noise": "dpo_noisy",
              "DPO, one city in a pair": f"dpo_same_{n}"}  # fmt: skip
    usual |= others if settings.full else {}

    def each(prefix, says, value, supported, unit, of):
        return [
            Claim(f"{prefix} {name}", says, partial(value, arm=arm), supported, unit=unit)
            for name, arm in of.items()
        ]

    def metric(results, *, name, arm):
        return results.values(name, arm)

    return (
        *each("wrong,", f"P(wrong) of marked facts, {n} labels",
              partial(metric, name="wrong_known"), (-np.inf, ENOUGH), "probability", usual),
        *each("collateral,", "KL of all that was not marked", partial(metric, name="collateral"),
              (-np.inf, 0.1), "nats", usual),
        *each("clean text,", "NLL of true sentences, of all cities", partial(metric, name="clean"),
              (-np.inf, 1.0), "nats per token", usual),
        *each("unmarked,", "P(wrong) of facts that nobody marked",
              partial(metric, name="wrong_other"), (-np.inf, settings.data.task.false),
              "probability", {**usual, "reward model": "token_model_rl"}),
        *each("steepest,", "largest norm of a gradient", partial(metric, name="steepest"),
              (-np.inf, 10.0), "norm", usual),
        *each("speed,", f"first step with P(wrong) ≤ {FORGOTTEN} (the last if never)",
              partial(_first, n=settings.train.steps), (-np.inf, settings.train.steps / 2), "steps",
              usual),
        *each("labels,", f"labels until P(wrong) ≤ {ENOUGH}",
              lambda r, arm: labels_until(r, arm, settings.data.labels), (-np.inf, 300.0),
              "labels", {"horizon 1": "horizon_one", "DPO": "dpo"}
              | ({"DPO, one city in a pair": "dpo_same"} if settings.full else {})),
        *each("labels, false country,", f"labels until P(the false country) ≤ {ENOUGH}",
              lambda r, arm: labels_until(r, arm, settings.data.labels, metric="false_known"),
              (-np.inf, 300.0), "labels", {"horizon 1": "horizon_one", "DPO": "dpo"}),
        Claim(
            "carried",
            "P(wrong) of facts that nobody marked, by horizon 1 on the reward model, less before",
            lambda r: (
                r.values("wrong_other", "token_model_rl")
                - r.values("wrong_other", "token_model_rl", 0)
            ),
            supported=(-np.inf, 0.0),
            unit="probability",
        ),
        Claim(
            "insight",
            "the reward model ranks the right country first: share of cities that nobody marked",
            lambda r: r.values("right_other", "token_model"),
            supported=(0.5, np.inf),
            unit="share",
        ),
        Claim(
            "reward model",
            "P(wrong) of marked facts: horizon 1 on it less on the marks themselves",
            lambda r: (
                r.values("wrong_known", "token_model_rl")
                - r.values("wrong_known", f"horizon_one_{n}")
            ),
            supported=(0.0, np.inf),
            unit="probability",
        ),
        Claim(
            "straight",
            "R² of a line through log p(false) of signed likelihood at a constant rate",
            lambda r: line(*r.curve("log_false", "signed"))[1],
            supported=(0.95, np.inf),
            unit="R²",
        ),
        Claim(
            "slope",
            "of that line: nats per step",
            lambda r: line(*r.curve("log_false", "signed"))[0],
            supported=(-np.inf, 0.0),
            unit="nats per step",
        ),
        *each("later,", "P(wrong) with the mark on the word that decides",
              partial(metric, name="wrong_known"), (-np.inf, ENOUGH), "probability",
              {"marked there": "late_moved"} if settings.full else {}),
    )  # fmt: skip


def _first(results: Results, *, arm: str, n: int) -> np.ndarray:
    """The first measured step after which P(wrong) is at most 2 %; n if it never is."""
    steps, wrong = results.curve("wrong_known", arm)
    below = wrong <= FORGOTTEN
    return np.where(below.any(axis=1), steps[below.argmax(axis=1)], float(n))
