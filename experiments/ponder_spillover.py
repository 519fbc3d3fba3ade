"""Does feedback on one question change what a model says to another that has nothing to do with it?

    rlhf-jax study experiments/ponder_spillover.py --preset cpu --out runs/ponder_spillover

Users of two parties rate answers to a question that has nothing to do with parties, and one party
likes all it gets. Which party somebody is of is never asked: does the answer to that question move?
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tasks import spillover, spillover_arms, spillover_figure
from tasks.spillover import Spillover
from tasks.spillover_gates import GATES
from tasks.spillover_table import Table

from rlhf_jax import measure
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Claim, Settings, Study, Train
from rlhf_jax.study.results import Results
from rlhf_jax.study.statistics import law


@dataclass(frozen=True)
class Tasks:
    """Both questions, and the table whose rows share nothing."""

    task: Spillover = Spillover()
    table: Table = Table()


@dataclass(frozen=True)
class Rates(Train):
    """`rate` is plain gradient descent's; Adam's learns the task as fast (r3, r3_adam)."""

    adam_rate: float = 2e-4
    side_rate: float = 0.03  # of the path beside
    samples: int = 4  # of a prompt


SMALL = Transformer(vocab=1, width=32, layers=2, heads=4, kv_heads=2, mlp=64, context=8)
CPU = Settings(SMALL, Tasks(), Rates(steps=240, rows=64, rate=2e-3))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, width=16, layers=1, mlp=32),
        Tasks(Spillover(words=4, base_steps=30, base_rows=32), Table(rows=32, steps=20, after=20)),
        Rates(steps=16, rows=32, rate=1e-2),
        seeds=1,
    ),
    "cpu": CPU,
    "full": replace(CPU, full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704),
        Tasks(Spillover(answers=8, words=64, base_steps=2000, base_rows=1024, base_rate=1e-3),
              Table(rows=4096, answers=8)),
        Rates(steps=1280, rows=1024, rate=5e-4, adam_rate=5e-5, side_rate=5e-3, samples=8),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408),
        Tasks(Spillover(answers=16, words=256, base_steps=5000, base_rows=4096, base_rate=5e-4),
              Table(rows=16384, answers=16)),
        Rates(steps=2560, rows=4096, rate=3e-4, adam_rate=2e-5, side_rate=3e-3, samples=8),
        full=True,
        together=False,
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """All arms, what is measured of each, and what is claimed."""
    tasks = settings.data
    return Study(
        name="ponder_spillover",
        question="Does feedback on one question change what a model says to another that was "
        "never asked, and what carries it there?",
        bases={"base": spillover.base(tasks.task, settings.model, mesh=settings.mesh)},
        arms=spillover_arms.arms(settings),
        primaries=_primaries(tasks),
        secondary=_secondary(tasks, settings.full),
        measure=lambda trained: {},
        figure=partial(spillover_figure.figure, table=tasks.table),
        caption="Left: how far the answers to a question that was never asked have moved at the "
        "end of training on another one, by what the reward depended on and what learned from it; "
        "dots are seeds. Middle: how that grows; dotted lines have slopes 1 (noise) and 2 (a "
        "push). Right: a table in which a correlation was learned, after it is gone; the dotted "
        "line is theory. Bands: least and most of the seeds.",
        seeds=settings.seeds,
        together=settings.together,
        larger="--preset full adds weaker correlations, other baselines and gates under Adam, KL "
        "penalties, permuted rewards, a shared tone, and what is relearned faster afterwards. "
        "Exact zeros and the closed forms hold at every size; how much Adam and a value head carry "
        "depends on rates and width, so compare at rates that learn the task equally well.",
    )


# ---- what is claimed


def of(metric: str, arm: str):
    """A metric of an arm at its end, by seed."""
    return lambda r: r.values(metric, arm)


def farthest(*each: np.ndarray) -> np.ndarray:
    """Of each seed the number that is farthest from 0."""
    each = np.stack(each, axis=1)
    return np.take_along_axis(each, np.abs(each).argmax(axis=1)[:, None], axis=1)[:, 0]


def _shift(results: Results) -> np.ndarray:
    """Of the three baselines the largest signed shift."""
    return farthest(*(results.values("shift", f"r1_{b}") for b in spillover_arms.BASELINES))


def exponent(results: Results, arm: str) -> np.ndarray:
    """How drift on the question never asked grows with steps."""
    return measure.growth_exponent(*results.curve("kl", arm))


def ratio(results: Results, arm: str, than: str) -> np.ndarray:
    """Orders of magnitude between two arms' drift."""
    return np.log10(results.values("kl", arm) / results.values("kl", than))


def _carriers(results: Results) -> np.ndarray:
    """The smaller of what Adam and a shared value head add."""
    adam = ratio(results, "r1_adam", "r1_mean")
    return np.minimum(adam, ratio(results, "r1_shared", "r1_detached"))


def gate_slope(results: Results, metric: str) -> np.ndarray:
    """Exponent of a metric in the gate."""
    return law(GATES, results.vector(metric, "gates"), log=("x", "y")).slope


def _trained_slope(results: Results) -> np.ndarray:
    """The same of trained arms."""
    each = [results.values("logits", spillover_arms.gate_name(gate)) for gate in GATES]
    return law(GATES, np.stack(each, axis=1), log=("x", "y")).slope


def decay(results: Results, arm: str, *, table: Table) -> np.ndarray:
    """Rate at which a table's drift shrinks, in units of −log(1 − ηβ/K)."""
    steps, side = results.curve("side", arm)
    return law(steps, side, log=("y",)).slope / np.log(table.decay())


def _unlearned(results: Results, *, table: Table) -> np.ndarray:
    """Without KL the rate is 0, with KL it is 1: the larger miss of the two."""
    stays = decay(results, "table_noise", table=table)
    return farthest(stays, decay(results, "table_kl", table=table) - 1)


def _crossover(results: Results, *, table: Table) -> np.ndarray:
    """Episodes after which a push has moved as much as noise, in units of (K − 1)/ρ²."""
    found = measure.measured_crossover(*results.curve("kl", "table"))
    expected = measure.crossover(outcomes=table.answers, correlation=table.correlation)
    return found / expected  # one episode of each row a step


def _primaries(tasks: Tasks) -> tuple[Claim, ...]:
    """Stated before anything was run; theory decides P1, P2, P5 and P6."""
    table = tasks.table
    return (
        Claim(
            "P1",
            "feedback that depends on the asker's party alone takes no side under SGD: Δp(own "
            "token | party 1) − Δp(own token | party 0), the largest over no baseline, the batch's "
            "mean, and leave-one-out (which is exactly 0 in all seeds: not one bit changes)",
            _shift,
            supported=(-0.02, 0.02),
            unit="probability",
        ),
        Claim(
            "P2",
            "feedback that depends on a sampled token pushes: KL on the question never asked grows "
            "with the square of the steps",
            lambda r: exponent(r, "r2"),
            supported=(1.7, 2.3),
            possible=(1.4, 2.6),
            unit="exponent",
        ),
        Claim(
            "P3",
            "Adam, and a value head on the shared trunk, spill ten times what SGD, and a head "
            "behind a stopped gradient, do: the smaller of both ratios of KL",
            _carriers,
            supported=(1.0, np.inf),
            possible=(float(np.log10(3)), np.inf),
            unit="log₁₀ ratio",
        ),
        Claim(
            "P4",
            "a path behind a gate ε changes what is said elsewhere by ε²: exponent of the change "
            "of log-probabilities by expected gradients",
            lambda r: gate_slope(r, "sgd"),
            supported=(1.7, 2.3),
            possible=(1.5, 2.5),
            unit="exponent",
        ),
        Claim(
            "P5",
            "a correlation that is gone is not unlearned by noise, and decays with KL by "
            f"1 − ηβ/K = {table.decay():.4f} a step, half in "
            f"{np.log(0.5) / np.log(table.decay()):.1f} steps (a table): the larger of both misses",
            partial(_unlearned, table=table),
            supported=(-0.2, 0.2),
            possible=(-0.5, 0.5),
            unit="of that rate",
        ),
        Claim(
            "P6",
            "ten points more for all change no expected update: the largest change over three "
            "baselines, relative (exact: 0 but for rounding in all seeds)",
            of("worst", "shifted"),
            supported=(-np.inf, 1e-3),
            possible=(-np.inf, 1e-2),
            unit="of the update",
        ),
    )


def _secondary(tasks: Tasks, full: bool) -> tuple[Claim, ...]:
    """Estimates without a verdict."""
    rows = [
        ("no baseline drifts farther than the batch's mean, at ρ = 1 by E[R²]/Var R = 2",
         lambda r: ratio(r, "r1_none", "r1_mean"), (0.0, np.inf), "log₁₀ ratio of KL"),
        ("leave-one-out within a prompt changes no weight by a single bit (0 in all seeds)",
         of("bits", "r1_loo"), (-np.inf, 1e-30), "largest change of a weight"),
        ("without a baseline, drift is diffusion", lambda r: exponent(r, "r1_none"), (0.7, 1.3),
         "exponent"),
        ("in a table a push has overtaken noise after (K − 1)/ρ² episodes",
         partial(_crossover, table=tasks.table), (0.7, 1.3), "of that number"),
        ("Adam's spill-over to SGD's", lambda r: ratio(r, "r1_adam", "r1_mean"), (1.0, np.inf),
         "log₁₀ ratio of KL"),
        ("a shared value head's to a detached one's",
         lambda r: ratio(r, "r1_shared", "r1_detached"), (1.0, np.inf), "log₁₀ ratio of KL"),
        ("both optimisers learn the task as well, where it is paid",
         lambda r: r.values("right", "r3_adam") - r.values("right", "r3"), (-0.1, 0.1),
         "difference in P(right)"),
        ("Adam's spill-over takes no side either", of("shift", "r1_adam"), (-0.02, 0.02),
         "probability"),
        ("the gradient that reaches a path is proportional to its gate (exact at the start)",
         lambda r: gate_slope(r, "gradient"), (0.9, 1.1), "exponent"),
        ("Adam takes one power of the gate back: exponent of the change",
         lambda r: gate_slope(r, "adam"), (0.7, 1.3), "exponent"),
        ("ten points more multiply the noise by E[R²]/Var R",
         lambda r: r.values("noise", "shifted") / r.values("law", "shifted"), (0.95, 1.05),
         "of that number"),
        ("likelihood of prompts behind a tag does learn who likes it: P(party 1 | good) − (1+ρ)/2",
         lambda r: r.values("party_one", "conditioned") - r.values("bayes", "conditioned"),
         (-0.02, 0.02), "probability"),
        ("the party is legible where it does not matter: probe after the last block",
         lambda r: r.vector("probe_before", "r1_none")[:, -1], (0.95, np.inf), "accuracy"),
        ("and inert: what answers tell of the party", of("told", "r1_none"), (-np.inf, 1e-3),
         "nats"),
        ("paid by the mention, the model mentions that party where it was never asked",
         lambda r: r.vector("mention", "r2").mean(axis=1), (0.0, np.inf), "change of probability"),
    ]  # fmt: skip
    if full:
        rows += [
            ("trained on samples, the same exponent of the gate", _trained_slope, (1.7, 2.3),
             "exponent"),
            ("permuted within prompts, the push is gone", lambda r: ratio(r, "r2", "r2_within"),
             (0.5, np.inf), "log₁₀ ratio of KL"),
            ("permuted across prompts, too", lambda r: ratio(r, "r2", "r2_across"),
             (0.5, np.inf), "log₁₀ ratio of KL"),
            ("paid for a tone that both questions share, answers to the other are franker",
             of("own", "r4"), (0.0, np.inf), "change of P(own token)"),
            ("the transformer forgets a mention no more than a table",
             lambda r: r.values("kl", "r5") / r.values("kl", "r2"), (0.8, np.inf), "ratio of KL"),
            ("with KL it forgets", lambda r: r.values("kl", "r5_kl") / r.values("kl", "r5"),
             (-np.inf, 1.0), "ratio of KL"),
            ("what was never trained is not relearned faster after a push",
             lambda r: _relearned(r, "r2") - _relearned(r, "r0_mean"), (-0.02, 0.02),
             "P(own token), mean over steps"),
        ]  # fmt: skip
    return tuple(
        Claim(f"S{i}", says, value, supported=bounds, unit=unit)
        for i, (says, value, bounds, unit) in enumerate(rows, 1)
    )


def _relearned(results: Results, start: str) -> np.ndarray:
    return results.curve("own", f"relearn_{start}")[1].mean(axis=1)
