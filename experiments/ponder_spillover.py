"""Does feedback on one question change what a model says to another that has nothing to do with it?

    rlhf-jax study experiments/ponder_spillover.py --preset cpu --out runs/ponder_spillover

Users of two parties rate answers to a question that has nothing to do with parties, and one party
likes all it gets. Which party somebody is of is never asked: does the answer to that question move?
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tasks import spillover, spillover_arms, spillover_claims, spillover_figure
from tasks.spillover import Spillover
from tasks.spillover_table import Table

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Settings, Study, Train


@dataclass(frozen=True)
class Tasks:
    """Both questions, and the table whose rows share nothing."""

    task: Spillover = Spillover()
    table: Table = Table()


@dataclass(frozen=True)
class Rates(Train):
    """`rate` is plain gradient descent's; Adam's learns a paid mention as fast (r2, r2_adam)."""

    adam_rate: float = 2.2e-5
    side_rate: float = 0.03  # of the path beside
    value_weight: float = 60.0  # of a head's loss: it shall learn its value within the run
    samples: int = 4  # of a prompt


SMALL = Transformer(vocab=1, width=32, layers=2, heads=4, kv_heads=2, mlp=64, context=8)
CPU = Settings(SMALL, Tasks(), Rates(steps=240, rows=64, rate=6e-4))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, width=16, layers=1, mlp=32),
        Tasks(Spillover(words=4, base_steps=30, base_rows=32)),
        Rates(steps=16, rows=32, rate=1e-2),
        seeds=1,
        arms=("r1_loo", "shifted"),
    ),
    "cpu": CPU,
    "full": replace(CPU, full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704),
        Tasks(Spillover(answers=8, words=64, base_steps=2000, base_rows=1024, base_rate=1e-3),
              Table(rows=4096, answers=8)),
        Rates(1280, 1024, 1.4e-5, adam_rate=1e-6, side_rate=5e-3, value_weight=320, samples=8),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408),
        Tasks(Spillover(answers=16, words=256, base_steps=5000, base_rows=4096, base_rate=5e-4),
              Table(rows=16384, answers=16)),
        Rates(2560, 4096, 3.5e-6, adam_rate=2e-7, side_rate=3e-3, value_weight=640, samples=8),
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
        primaries=spillover_claims.primaries(tasks.table),
        secondary=spillover_claims.secondary(tasks.table, full=settings.full),
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
        "depends on rates and width: compare at rates that learn a mention alike (r2, r2_adam).",
    )
