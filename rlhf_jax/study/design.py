"""The nouns of a study: arms × paired seeds, claims named beforehand, and one figure.

A study's file has `PRESETS`, named settings from `cpu_ci` to `pod`, and `config(settings)`, which
returns a `Study`. Every arm is a `Config`, the value that `rlhf-jax train` runs, so that the same
arm trains eight seeds in one program on a laptop and one seed at a time on a pod.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.config import Config, ConfigError
from rlhf_jax.types import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rlhf_jax.study.results import Results

MOST = 6  # primaries: of more, Holm's correction lets none survive with 8 seeds (2/256 · 6 < .05)
SEEDS = 8


@dataclass(frozen=True)
class Train:
    """How long and how fast; a study with other numbers adds them in a subclass."""

    steps: int = 300
    rows: int = 256  # of one step's batch
    rate: float = 2e-3  # learning rate


@dataclass(frozen=True)
class Settings:
    """All that may differ between a laptop and a pod. Claims and arms are the same on both."""

    model: Any
    data: Any  # a frozen dataclass of the study's own: sizes of its task
    train: Train = Train()
    seeds: int = SEEDS  # 0 .. seeds − 1
    full: bool = False  # arms that no primary needs, too
    arms: tuple[str, ...] = ()  # those that are run; none named: all
    together: bool = True  # all seeds in one program; False: one run after another, on the mesh
    # data, fsdp, tensor, sequence, of runs one after another
    mesh: tuple[int, int, int, int] = (-1, 1, 1, 1)


@dataclass(frozen=True)
class Trained:
    """One seed of one arm after some steps: what a measure looks at."""

    arm: str
    seed: int
    step: int  # 0: before training
    config: Config
    weights: Mapping[str, Params]  # of learners and frozen trees
    before: Mapping[str, Mapping[str, Params]]  # of the bases and arms it starts from, at their end
    curves: Mapping[str, np.ndarray] = field(default_factory=dict)  # metrics [steps] so far


@dataclass(frozen=True)
class Arm:
    """One way of training, measured at its end and after the steps in `at`.

    `run` may start from a base or an earlier arm: `Learner.start=From(stage="base")`. Instead of a
    Config it may be a function of the seed and the weights of `needs` that returns the metrics of
    an arm which is computed, not trained: a closed form, a table.
    """

    run: Config | Callable[[int, Mapping[str, Mapping[str, Params]]], Mapping[str, float]]
    says: str  # what it is, in a few words, for the table and the legend
    at: tuple[int, ...] = ()
    measure: Callable[[Trained], Mapping[str, float]] | None = None  # None: the study's
    needs: tuple[str, ...] = ()  # bases and arms it reads besides those it starts from


@dataclass(frozen=True)
class Claim:
    """A sentence about the mean of one number per seed, and what would make it true or false.

    Supported: the mean lies inside `supported`. Refuted: it lies outside `possible`. Both by exact
    sign-flip tests against the bounds; neither: undecided. An open bound is ±inf. A difference is
    `supported=(0, inf)`, "equal to" is `(-margin, margin)` (two one-sided tests).
    """

    name: str  # P1
    says: str
    value: Callable[[Results], np.ndarray]  # [seeds]
    supported: tuple[float, float]
    possible: tuple[float, float] | None = None  # None: the same interval
    unit: str = ""

    def __post_init__(self):
        low, high = self.supported
        least, most = self.supported if self.possible is None else self.possible
        endless = any(math.isinf(a) and math.isinf(b) for a, b in ((low, high), (least, most)))
        if not least <= low < high <= most or endless:
            raise ValueError(
                f"claim {self.name}: supported={self.supported} must be an interval with at least "
                f"one finite bound, inside possible={self.possible}, which has one, too: a claim "
                "can be refuted"
            )


@dataclass(frozen=True)
class Study:
    """Arms, what is claimed of them, and how they are looked at."""

    name: str
    question: str  # one sentence, with a question mark
    arms: Mapping[str, Arm]
    primaries: tuple[Claim, ...]  # at most 6, one family; each gets a verdict
    measure: Callable[[Trained], Mapping[str, float]]
    figure: Callable[[Results], Figure]
    caption: str  # how to read the figure
    secondary: tuple[Claim, ...] = ()  # an estimate and its interval, without a verdict
    bases: Mapping[str, Config] = field(default_factory=dict)  # trained once, cached, shared
    seeds: int = SEEDS
    together: bool = True
    larger: str = ""  # how to run it larger, and what to expect to change

    def __post_init__(self):
        if len(self.primaries) > MOST:
            raise ConfigError(
                f"study {self.name!r} has {len(self.primaries)} primaries; at most {MOST} can "
                "survive the correction for their number: make the others secondary"
            )
        if both := set(self.arms) & set(self.bases):
            raise ConfigError(f"study {self.name!r}: {sorted(both)} are arms and bases; rename")
        names = [claim.name for claim in (*self.primaries, *self.secondary)]
        if len(set(names)) < len(names):
            raise ConfigError(f"study {self.name!r}: two claims have one name: {names}")

    @property
    def configs(self) -> dict[str, Config]:
        """Everything that is trained, by name: bases, then arms."""
        trained = {name: arm.run for name, arm in self.arms.items() if isinstance(arm.run, Config)}
        return {**self.bases, **trained}
