"""Does fine-tuning teach a language model anything, or does it move its prior over worlds?

    rlhf-jax study experiments/world_prior.py --preset cpu --out runs/world_prior

Texts come from hidden worlds that stick around, and everything about them is known exactly. A model
of all worlds is moved towards one: by texts of that world, by RL for its tokens, or by pretraining
anew with more of it. Is what comes out the same model? What happens when it is interrupted?
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tasks import prior_arms, prior_figure
from tasks.prior import Prior

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Claim, Settings, Study, Train
from rlhf_jax.study.results import Results


@dataclass(frozen=True)
class Sizes:
    """The task, and what learning from texts takes; RL is `train`."""

    task: Prior = Prior()
    base_steps: int = 1500
    base_rows: int = 64
    base_rate: float = 5e-3
    sft_steps: int = 60
    sft_rows: int = 64
    sft_rate: float = 5e-4
    samples: int = 512  # texts for one measure
    injected: tuple[int, ...] = (4,)  # tokens of another world, in the attractor test
    temperatures: tuple[float, ...] = (0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0, 2.6)
    matched: float = 0.75  # the reward at which arms are compared


SMALL = Transformer(vocab=1, width=32, layers=2, heads=4, kv_heads=2, mlp=64, context=64)
CPU = Settings(SMALL, Sizes(), Train(steps=300, rows=64, rate=1e-3))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, width=16, layers=1, mlp=32),
        Sizes(base_steps=20, base_rows=32, sft_steps=8, sft_rows=16, samples=64,
              temperatures=(0.7, 1.0, 1.6)),
        Train(steps=6, rows=32, rate=1e-3),
        seeds=1,
        arms=("sft", "rl_02"),
    ),
    "cpu": CPU,
    "full": replace(CPU, data=Sizes(injected=(1, 2, 4, 8)), full=True),
    "gpu1": Settings(
        replace(SMALL, width=256, layers=4, heads=8, kv_heads=4, mlp=704, context=256),
        Sizes(Prior(length=96), base_steps=5000, base_rows=512, base_rate=1e-3,
              sft_rows=256, sft_rate=1e-4, samples=2048, injected=(1, 2, 4, 8)),
        Train(steps=2000, rows=1024, rate=3e-4),
        full=True,
    ),
    "pod": Settings(
        replace(SMALL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408, context=512),
        Sizes(Prior(length=192), base_steps=10000, base_rows=2048, base_rate=5e-4,
              sft_rows=1024, sft_rate=1e-4, samples=2048, injected=(1, 2, 4, 8)),
        Train(steps=4000, rows=4096, rate=2e-4),
        full=True,
        together=False,
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """Ways to move a model towards one world; `full` has more of them."""
    sizes = settings.data
    return Study(
        name="world_prior",
        question="Does fine-tuning move a language model's prior over worlds, and nothing else: by "
        "supervised texts as by RL?",
        bases=prior_arms.bases(settings),
        arms=prior_arms.arms(settings),
        primaries=_primaries(sizes),
        secondary=_secondary(settings),
        measure=lambda trained: {},
        figure=lambda results: prior_figure.figure(results, sizes=sizes),
        caption="Left: entropy over worlds against what texts earn, along training; lower is "
        "narrower. Middle: after four tokens of another world, how many tokens are of the wanted "
        "one again; lines: models, dashes: the exact filter of the worlds each model believes in. "
        "Right: the wanted world's share as the sampler is heated; dots: where the entropy is the "
        "base's again. Means over seeds; bands: least and most of the seeds.",
        seeds=settings.seeds,
        together=settings.together,
        larger="Longer texts make interruptions rarer within a text and the filter surer; a larger "
        "base is closer to the process, and what is left between model and filter is the finding.",
    )


def _primaries(sizes: Sizes) -> tuple[Claim, ...]:
    """Stated before anything was run."""
    share = f"share/{sizes.task.wanted}"
    return (
        Claim(
            "P1",
            "fine-tuning is reweighted pretraining: KL of a model pretrained with more of the "
            "wanted world to the supervised one, where both say it equally often",
            lambda r: r.when("gap", "sft", by=share, level=r.values(share, "reweighted")),
            supported=(-np.inf, 0.02),
            possible=(-np.inf, 0.04),
            unit="nats per token",
        ),
        Claim(
            "P2",
            "a text that is interrupted comes back as the exact filter does, with the prior that "
            "the supervised model believes in: its rate of return ÷ the filter's",
            lambda r: r.values("hazard_4", "sft") / r.values("refit_hazard_4", "sft"),
            supported=(0.8, 1.25),
            possible=(0.5, 2.0),
            unit="ratio",
        ),
        Claim(
            "P3",
            "what fine-tuning does not mention stays: KL of uniform digits to those said after "
            "CODE, supervised less base",
            lambda r: r.values("code_kl", "sft") - r.values("code_kl", "sft", 0),
            supported=(-0.02, 0.02),
            unit="nats",
        ),
        Claim(
            "P4",
            "heat does not undo it: where the entropy is the base's again, the wanted world's "
            "share after RL with β = 0.02 ÷ its share at temperature 1",
            lambda r: r.values("star_share", "rl_02") / r.values(share, "rl_02"),
            supported=(0.5, np.inf),
            unit="ratio",
        ),
        Claim(
            "P5",
            "RL and supervision narrow alike: H(W) at equal reward, supervised less RL with "
            "β = 0.02",
            lambda r: _apart(r, "world_entropy", "reward", sizes.matched),
            supported=(-0.1, 0.1),
            unit="nats",
        ),
        Claim(
            "P6",
            "without KL penalty RL goes deeper, into what a world says: H(Y|W) in the block, RL "
            "with β = 0 less base",
            lambda r: r.values("in_block", "rl_0") - r.values("in_block", "rl_0", 0),
            supported=(-np.inf, 0.0),
            unit="nats per token",
        ),
    )


def _secondary(settings: Settings) -> tuple[Claim, ...]:
    """Where theory decides, the controls of the primaries, and pairs at equal KL."""
    sizes = settings.data
    found = (
        Claim(
            "S1",
            "supervision narrows: H(W) less the base's",
            lambda r: _change(r, "world_entropy", "sft"),
            supported=(-np.inf, 0.0),
            unit="nats",
        ),
        Claim(
            "S2",
            "RL with β = 0.02 narrows, too",
            lambda r: _change(r, "world_entropy", "rl_02"),
            supported=(-np.inf, 0.0),
            unit="nats",
        ),
        Claim(
            "S3",
            "P5 at equal KL to the base, that of RL where it earns as much as in P5",
            lambda r: _apart(
                r, "world_entropy", "kl", r.when("kl", "rl_02", by="reward", level=sizes.matched)
            ),
            supported=(-0.1, 0.1),
            unit="nats",
        ),
        Claim(
            "S4",
            "control of P6: with β = 0.02 H(Y|W) stays",
            lambda r: _change(r, "in_block", "rl_02"),
            supported=(-0.01, 0.01),
            unit="nats per token",
        ),
        Claim(
            "S5",
            "an interrupted text comes back sooner: rate of return over lags 1 to 8, supervised "
            "÷ base",
            lambda r: r.values("hazard_4", "sft") / r.values("hazard_4", "sft", 0),
            supported=(3.0, np.inf),
            unit="ratio",
        ),
        Claim(
            "S6",
            "P2 of the base: its rate of return ÷ that of the process's own filter",
            lambda r: r.values("hazard_4", "sft", 0) / r.values("process_hazard_4", "sft", 0),
            supported=(0.8, 1.25),
            unit="ratio",
        ),
        Claim(
            "S7",
            "control of P2: pretrained anew, a model does come back as the filter of its prior",
            lambda r: r.values("hazard_4", "reweighted") / r.values("refit_hazard_4", "reweighted"),
            supported=(0.8, 1.25),
            unit="ratio",
        ),
        Claim(
            "S8",
            "RL does not wait for the world to change, it goes back: tokens of the wanted world "
            "after an interruption, β = 0.02 less the optimum of KL-RL, mean over lags",
            lambda r: (r.vector("returned_4", "rl_02") - r.vector("best_returned_4", "rl_02")).mean(
                axis=1
            ),
            supported=(-0.05, 0.05),
            unit="share",
        ),
        Claim(
            "S9",
            "control of P3: what fine-tuning texts contradict does change, KL after CHAT less the "
            "base's",
            lambda r: _change(r, "chat_kl", "sft"),
            supported=(0.02, np.inf),
            unit="nats",
        ),
        Claim(
            "S10",
            "RL says nothing about numbers and leaves them alone: P3 after RL with β = 0.02",
            lambda r: r.values("code_kl", "rl_02") - r.values("code_kl", "sft", 0),
            supported=(-0.02, 0.02),
            unit="nats",
        ),
        Claim(
            "S11",
            "with β = 0.02 RL ends where theory says: what its E[r] − β KL lacks to the best",
            lambda r: (
                r.values("best_objective", "rl_02")
                - (r.values("reward", "rl_02") - 0.02 * r.values("kl", "rl_02"))
            ),
            supported=(-np.inf, 0.01),
            unit="reward",
        ),
        Claim(
            "S12",
            "and only says more of what pays: KL within texts that earn the same",
            lambda r: r.values("kl_within", "rl_02"),
            supported=(-np.inf, 0.02),
            unit="nats per text",
        ),
        Claim(
            "S13",
            "control of S12: without KL penalty it changes more than that",
            lambda r: r.values("kl_within", "rl_0"),
            supported=(0.05, np.inf),
            unit="nats per text",
        ),
        Claim(
            "S14",
            "what the entropy's repair by heat leaves: KL to the base at that temperature ÷ KL at "
            "temperature 1, RL with β = 0.02",
            lambda r: r.values("star_kl", "rl_02") / r.values("kl", "rl_02"),
            supported=(0.5, np.inf),
            unit="ratio",
        ),
        Claim(
            "S15",
            "P1 and P5 compare at levels that are reached: what the farthest of the three lacks",
            lambda r: _lacks(r, sizes),
            supported=(-np.inf, 0.05),
            unit="share",
        ),
    )
    return found + _of_all_arms() if settings.full else found


def _of_all_arms() -> tuple[Claim, ...]:
    """What only the arms that no primary needs can say."""
    return (
        Claim(
            "S16",
            "at equal reward RL keeps more entropy than supervision on its own best texts: nats "
            "per text, RL with β = 0.02 less that",
            lambda r: (
                r.when("entropy", "rl_02", by="reward", level=r.values("reward", "filtered"))
                - r.values("entropy", "filtered")
            ),
            supported=(0.0, np.inf),
            unit="nats",
        ),
        Claim(
            "S17",
            "a small corpus is learned by heart: H(Y|W) in the block, 100 texts less base",
            lambda r: _change(r, "in_block", "sft_100_texts"),
            supported=(-np.inf, 0.0),
            unit="nats per token",
        ),
    )


def _change(results: Results, metric: str, arm: str) -> np.ndarray:
    """At an arm's end, less the base's."""
    return results.values(metric, arm) - results.values(metric, arm, 0)


def _apart(results: Results, metric: str, by: str, level: float | np.ndarray) -> np.ndarray:
    """A metric of the supervised arm less that of RL with β = 0.02, where another one is equal."""
    one, other = (results.when(metric, arm, by=by, level=level) for arm in ("sft", "rl_02"))
    return one - other


def _lacks(results: Results, sizes: Sizes) -> np.ndarray:
    """By how much an arm stays below the level at which it is compared."""
    share = f"share/{sizes.task.wanted}"
    compared = (
        (share, "sft", results.values(share, "reweighted")),
        ("reward", "sft", sizes.matched),
        ("reward", "rl_02", sizes.matched),
    )
    return np.max(
        [level - results.curve(by, arm)[1].max(axis=1) for by, arm, level in compared], axis=0
    )
