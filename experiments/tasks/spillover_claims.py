"""What `ponder_spillover.py` claims."""

from __future__ import annotations

from functools import partial

import numpy as np

from rlhf_jax import measure
from rlhf_jax.study import Claim
from rlhf_jax.study.results import Results
from rlhf_jax.study.statistics import farthest, law
from tasks import spillover_arms
from tasks.spillover_gates import GATES
from tasks.spillover_table import Table


def of(metric: str, arm: str):
    """A metric of an arm at its end, by seed."""
    return lambda r: r.values(metric, arm)


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


def primaries(table: Table) -> tuple[Claim, ...]:
    """Stated before anything was run; theory decides all but P3."""
    half = measure.half_life(rate=table.rate, beta=table.beta, outcomes=table.answers)
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
            "Adam at a rate that learns a paid token as fast spills ten times what SGD does, and a "
            "value head on the shared trunk ten times what one behind a stopped gradient does: the "
            "smaller of both ratios of KL",
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
            f"1 − ηβ/K = {table.decay():.4f} a step, half in {half:.1f} steps (a table): how far "
            "the rates of decay without and with KL miss 0 and theory, the larger of both",
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


def secondary(table: Table, *, full: bool = False) -> tuple[Claim, ...]:
    """Estimates without a verdict."""
    rows = _exact() + _trained(table)
    if full:
        rows += _others()
    return tuple(
        Claim(f"S{i}", says, value, supported=bounds, unit=unit)
        for i, (says, value, bounds, unit) in enumerate(rows, 1)
    )


def _exact():
    """Where theory says that nothing is left."""
    return [
        ("leave-one-out within a prompt changes no weight by a single bit (0 in all seeds)",
         of("bits", "r1_loo"), (-np.inf, 1e-30), "largest change of a weight"),
        ("whatever the correlation with the prompt (ρ = 0, .1, .5, 1) and the baseline, the "
         "expected update is 0 (exact, but for rounding)", of("null", "shifted"), (-np.inf, 1e-3),
         "of a sampled mention's update"),
        ("a mean of two that includes the own sample keeps (B − 1)/B = ½ of the update (exact)",
         of("kept", "shifted"), (0.49, 0.51), "of the update"),
        ("ten points more multiply the noise by E[R²]/Var R",
         lambda r: r.values("noise", "shifted") / r.values("law", "shifted"), (0.95, 1.05),
         "of that number"),
    ]  # fmt: skip


def _trained(table):
    """What the arms of the primaries and their controls show besides."""
    return [
        ("no baseline drifts farther than the batch's mean, at ρ = 1 by E[R²]/Var R = 2",
         lambda r: ratio(r, "r1_none", "r1_mean"), (0.0, np.inf), "log₁₀ ratio of KL"),
        ("without a baseline, drift is diffusion", lambda r: exponent(r, "r1_none"), (0.7, 1.3),
         "exponent"),
        ("in a table a push has overtaken noise after (K − 1)/ρ² episodes",
         partial(_crossover, table=table), (0.7, 1.3), "of that number"),
        ("the shared head has learned its value by then: explained variance",
         of("explained", "r1_shared"), (0.5, np.inf), "of the reward's"),
        ("Adam's spill-over to SGD's", lambda r: ratio(r, "r1_adam", "r1_mean"), (1.0, np.inf),
         "log₁₀ ratio of KL"),
        ("a shared value head's to a detached one's",
         lambda r: ratio(r, "r1_shared", "r1_detached"), (1.0, np.inf), "log₁₀ ratio of KL"),
        ("both optimisers learn as fast what is paid, a mention: gain of Adam − gain of SGD",
         lambda r: _paid(r, "r2_adam") - _paid(r, "r2"), (-0.05, 0.05), "probability"),
        ("Adam's spill-over takes no side either", of("shift", "r1_adam"), (-0.02, 0.02),
         "probability"),
        ("the gradient that reaches a path is proportional to its gate (exact at the start)",
         lambda r: gate_slope(r, "gradient"), (0.9, 1.1), "exponent"),
        ("Adam takes one power of the gate back: exponent of the change",
         lambda r: gate_slope(r, "adam"), (0.7, 1.3), "exponent"),
        ("likelihood of prompts behind a tag does learn who likes it: P(party 1 | good) − (1+ρ)/2",
         lambda r: r.values("party_one", "conditioned") - r.values("bayes", "conditioned"),
         (-0.02, 0.02), "probability"),
        ("the party is legible where it does not matter: probe after the last block",
         lambda r: r.vector("probe_before", "r1_none")[:, -1], (0.95, np.inf), "accuracy"),
        ("and inert: what answers tell of the party", of("told", "r1_none"), (-np.inf, 1e-3),
         "nats"),
        ("paid by the mention, the model mentions that party where it was never asked",
         of("mention", "r2"), (0.0, np.inf), "change of probability"),
    ]  # fmt: skip


def _others():
    """Of the arms that `full` adds."""
    return [
        ("trained on samples, the same exponent of the gate", _trained_slope, (1.7, 2.3),
         "exponent"),
        ("both optimisers at these rates, where the task itself is paid: Adam − SGD",
         lambda r: r.values("right", "r3_adam") - r.values("right", "r3"), (-0.1, 0.1),
         "difference in P(right)"),
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


def _paid(results: Results, arm: str) -> np.ndarray:
    """How much more often a paid mention is made, where it is paid."""
    return results.values("mention_task", arm)


def _relearned(results: Results, start: str) -> np.ndarray:
    return results.curve("own", f"relearn_{start}")[1].mean(axis=1)
