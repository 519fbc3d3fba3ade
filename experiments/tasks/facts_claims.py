"""The secondary claims of `token_feedback.py`: what each arm leaves, costs and takes."""

from __future__ import annotations

from functools import partial

import numpy as np

from rlhf_jax.study import Claim, Settings
from rlhf_jax.study.results import Results
from tasks.facts_curves import ENOUGH, first, labels_until, line

FORGOTTEN = 0.02  # P(wrong) whose first step is compared


def secondary(settings: Settings, arms: tuple[str, ...]) -> tuple[Claim, ...]:
    """Those of arms that are there."""
    n = settings.data.usual
    ways = {
        "horizon 1": f"horizon_one_{n}", "unlikelihood": "unlikelihood",
        "signed likelihood": "signed", "preferences": f"dpo_{n}", "plain DPO": "dpo_plain",
        "sampled horizon 1": "table_rl", "reward model of tokens": "token_model_rl",
        "token NPO": "npo", "CRINGE": "cringe", "tags": "tags",
        "token rewards, whole horizon": "table_whole", "PPO": "ppo",
        "horizon 1, noise": "horizon_one_noisy", "unlikelihood, noise": "unlikelihood_noisy",
        "signed likelihood, noise": "signed_noisy", "preferences, noise": "dpo_noisy",
        "preferences, any two cities": "dpo_mixed",
    }  # fmt: skip
    ways = {name: arm for name, arm in ways.items() if arm in arms}
    looked = {name: arm for name, arm in ways.items() if arm in LOOKED or arm.endswith(f"_{n}")}
    return (
        *_labels(settings),
        *_each("wrong,", f"P(wrong) of marked facts, {n} labels", partial(_metric, "wrong_known"),
               (-np.inf, ENOUGH), "probability", ways),
        *_each("unmarked,", "P(wrong) of facts that nobody marked, less before",
               partial(_change, "wrong_other"), (-0.05, 0.05), "probability", ways),
        *_each("collateral,", "KL of all that was not marked", partial(_metric, "collateral"),
               (-np.inf, 0.5), "nats per sentence", ways),
        *_each("clean text,", "NLL of true sentences of all cities, less before",
               partial(_change, "clean"), (-np.inf, 0.05), "nats per token", ways),
        *_signed(n),
        *(_second_hand() if "token_model" in arms else ()),
        *(_full(settings, ways, looked) if settings.full else ()),
    )  # fmt: skip


LOOKED = ("unlikelihood", "signed", "dpo_plain", "npo", "cringe")  # measured on the way, too


def _each(prefix, says, value, supported, unit, of):
    return [
        Claim(f"{prefix} {name}", says, partial(value, arm=arm), supported, unit=unit)
        for name, arm in of.items()
    ]


def _metric(name: str, results: Results, *, arm: str) -> np.ndarray:
    return results.values(name, arm)


def _change(name: str, results: Results, *, arm: str) -> np.ndarray:
    return results.values(name, arm) - results.values(name, arm, 0)


def _labels(settings):
    labels, usual = settings.data.labels, settings.data.usual
    kinds = {"horizon 1": "horizon_one", "preferences": "dpo"}
    for prefix, says, metric in (
        ("labels,", "P(wrong)", "wrong_known"),
        ("labels, false country,", "P(the false country)", "false_known"),
    ):
        yield from _each(
            prefix, f"labels until {says} ≤ {ENOUGH}",
            lambda r, arm, metric=metric: labels_until(r, arm, labels, metric=metric),
            (-np.inf, float(usual)), "labels", kinds,
        )  # fmt: skip


def _signed(n):
    return (
        Claim(
            "matched",
            "KL of all that was not marked, of signed likelihood ÷ exact horizon 1, each at the "
            f"first measured step with P(wrong) ≤ {ENOUGH}",
            lambda r: (
                first(r, "signed", ENOUGH, of="collateral")
                / first(r, f"horizon_one_{n}", ENOUGH, of="collateral")
            ),
            supported=(3.0, np.inf),
            unit="ratio",
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
            "of that line",
            lambda r: line(*r.curve("log_false", "signed"))[0],
            supported=(-np.inf, 0.0),
            unit="nats per step",
        ),
    )


def _second_hand():
    return (
        Claim(
            "insight",
            "the reward model of tokens ranks the right country above the false one: share of "
            "cities that nobody marked",
            lambda r: r.values("right_other", "token_model"),
            supported=(0.5, np.inf),
            unit="share",
        ),
        Claim(
            "reward model",
            "P(wrong) of marked facts: sampled horizon 1 on the reward model less on the marks",
            lambda r: r.values("wrong_known", "token_model_rl") - r.values(
                "wrong_known", "table_rl"
            ),
            supported=(0.0, np.inf),
            unit="probability",
        ),
    )  # fmt: skip


def _full(settings, ways, looked):
    """What needs arms or numbers that no primary is about."""
    steps = settings.train.steps
    return (
        *_each("steepest,", "largest norm of a gradient", partial(_metric, "steepest"),
               (-np.inf, 10.0), "norm", ways),
        *_each("speed,", f"first measured step with P(wrong) ≤ {FORGOTTEN} (the last if never)",
               lambda r, arm: first(r, arm, FORGOTTEN), (-np.inf, steps / 2), "steps", looked),
        Claim("later, marked there", "P(wrong) with the mark on the word that decides",
              partial(_metric, "wrong_known", arm="late_moved"), (-np.inf, ENOUGH),
              unit="probability"),
    )  # fmt: skip
