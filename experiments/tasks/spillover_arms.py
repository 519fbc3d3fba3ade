"""The arms of `ponder_spillover.py`: what the reward depends on, and what carries it elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import jax
import optax

from rlhf_jax import advantages
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.objectives import combine, reinforce, value
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.rewards import KL
from rlhf_jax.sharding import path_name
from rlhf_jax.study import Arm, Settings
from tasks import (
    spillover,
    spillover_called,
    spillover_gates,
    spillover_measures,
    spillover_shift,
    spillover_table,
)
from tasks.likelihood import likelihood
from tasks.spillover import Beside, Detached, Speaker, Spillover, sized

BASELINES = {
    "none": (advantages.reward_to_go, "no baseline"),
    "mean": (advantages.batch_mean, "baseline: the batch's mean"),
    "loo": (advantages.leave_one_out, "baseline: the prompt's other samples (RLOO)"),
}
own_value = partial(advantages.gae, discount=1.0, trace=1.0)  # R − V of the text so far
MENTION = 0.5  # ρ of the arms in which the sampled mention is paid
WEAK = 0.5  # weight of a value head's loss as it is customary
SOME = 0.05  # β of the arms with a KL penalty


def gate_name(gate: float) -> str:
    """gate_0.3."""
    return f"gate_{gate:g}"


def side_only(*, learning_rate: float) -> optax.GradientTransformation:
    """The path beside learns; all other weights stay as they are."""

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "moves" if re.search("side_", path_name(path)) else "stays", params
        )

    moves = sgd(learning_rate=learning_rate)
    return optax.multi_transform({"moves": moves, "stays": optax.set_to_zero()}, label)


def chances(task: Spillover) -> dict[str, Callable]:
    """P(R = 1 | text) of every kind of reward."""
    party, mention = (
        partial(spillover.by_party, task=task),
        partial(spillover.by_mention, task=task),
    )
    return {
        "r0": partial(party, strength=0.0),
        "r1": partial(party, strength=1.0),
        "r1_half": partial(party, strength=0.5),
        "r1_tenth": partial(party, strength=0.1),
        "r2": partial(mention, strength=MENTION),
        "r2_off": partial(mention, strength=0.0),
        "r3": partial(spillover.by_answer, task=task),
        "r4": partial(spillover.by_tone, task=task, strength=MENTION),
    }


def run(
    name: str,
    settings: Settings,
    reward: str,
    *,
    baseline: str = "mean",
    rate: Callable | None = None,
    model: Speaker | None = None,
    objective: Callable = reinforce,
    beta: float = 0.0,
    start: str = "base",
    **moved: int,
) -> Config:
    """REINFORCE on TASK alone, from a base or an earlier arm; one optimiser step per batch."""
    task, train = settings.data.task, settings.train
    plain = sized(settings.model, task)
    model, begin = plain if model is None else model, From(stage=start)
    rate = partial(sgd, learning_rate=train.rate) if rate is None else rate
    learner = Learner(model, objective, optimizer=rate, start=begin)
    paid = partial(spillover.paid, chance=chances(task)[reward], samples=train.samples, **moved)
    draw = partial(spillover.asked, task=task)
    salt = 0 if start == "base" else 1  # other prompts' ids, other chances
    return Config(
        name=name,
        steps=train.steps,
        data={"prompts": partial(drawn, draw=draw, batch=train.rows // train.samples, salt=salt)},
        learners={"policy": learner},
        frozen={"reference": Frozen(From(stage="base"), plain)} if beta else {},
        rollouts=Rollouts(
            paid,
            length=2,
            samples=train.samples,
            reference="reference" if beta else None,
            value="policy" if baseline == "value" else None,
            kl=KL(beta, adaptive=False),
            advantage=own_value if baseline == "value" else BASELINES[baseline][0],
            show=0,
        ),
        mesh=settings.mesh,
    )


def arms(settings: Settings) -> dict[str, Arm]:
    """Of the settings: `full` has those that no primary needs."""
    found = _prompt_only(settings) | _sampled(settings) | _gates(settings) | _tables(settings)
    return found | spillover_called.arms(settings)


def times(settings: Settings) -> tuple[int, ...]:
    """Steps at which drift is measured: a half, a quarter, ... of them all."""
    return tuple(sorted({settings.train.steps // 2**i for i in range(1, 5)} - {0}))


def _prompt_only(settings: Settings) -> dict[str, Arm]:
    """Noise, and rewards that depend on the prompt's party: what carries them to other topics?"""
    task, train, at = settings.data.task, settings.train, times(settings)
    drift = partial(spillover_measures.drift, task=task)
    probed = partial(spillover_measures.probed, task=task)
    quick = partial(adam, learning_rate=train.adam_rate)
    sized_head = partial(sized, settings.model, task, value_head=True)

    def valued(kind, worth, name):
        both = partial(
            combine, policy=reinforce, value=partial(value, clip=None, coefficient=worth)
        )
        model = sized_head(kind)
        return run(name, settings, "r1", baseline="value", objective=both, model=model)

    found = {
        f"r1_{name}": Arm(
            run(f"r1_{name}", settings, "r1", baseline=name), f"{says}; SGD", at,
            probed if name == "none" else drift,
        )
        for name, (_, says) in BASELINES.items()
    }  # fmt: skip
    found["r1_adam"] = Arm(
        run("r1_adam", settings, "r1", rate=quick), "baseline: the batch's mean; Adam", at, probed
    )
    found["r1_detached"] = Arm(
        valued(Detached, train.value_weight, "r1_detached"),
        "baseline: a value head behind a stopped gradient; SGD",
        at,
        drift,
    )
    found["r1_shared"] = Arm(
        valued(Speaker, train.value_weight, "r1_shared"),
        "baseline: a value head on the shared trunk; SGD",
        at,
        probed,
    )
    if not settings.full:
        return found
    found["r1_shared_weak"] = Arm(
        valued(Speaker, WEAK, "r1_shared_weak"),
        f"the same, its loss with a weight of {WEAK}",
        at,
        drift,
    )
    for reward, rho in (("r0", "0"), ("r1_tenth", "0.1"), ("r1_half", "0.5")):
        for name, (_, says) in BASELINES.items():
            arm = f"{reward}_{name}"
            found[arm] = Arm(
                run(arm, settings, reward, baseline=name), f"{says}; SGD; ρ = {rho}", at, drift
            )
    for name, options in (("sgd", {}), ("adam", {"rate": quick})):
        arm = f"r1_kl_{name}"
        found[arm] = Arm(
            run(arm, settings, "r1", beta=SOME, **options), f"{name}, KL penalty {SOME}", at, drift
        )
    return found


def _sampled(settings: Settings) -> dict[str, Arm]:
    """Rewards that depend on what was sampled, and what undoes them."""
    task, train, at = settings.data.task, settings.train, times(settings)
    drift = partial(spillover_measures.drift, task=task)
    quick = partial(adam, learning_rate=train.adam_rate)

    def arm(name, says, reward, look=drift, **options):
        needs = ("base",) if "start" in options else ()
        return Arm(run(name, settings, reward, **options), says, at, look, needs)

    found = {
        "r2": arm("r2", f"paid by the sampled mention, ρ = {MENTION}; SGD", "r2"),
        "r2_adam": arm("r2_adam", f"paid by the sampled mention, ρ = {MENTION}; Adam", "r2",
                       rate=quick),
        "shifted": Arm(
            partial(
                spillover_shift.ten_more, model=sized(settings.model, task), task=task,
                chance=chances(task)["r2"],
            ),
            "ten points more for every sample: the expected update, exactly", needs=("base",),
        ),
    }  # fmt: skip
    if not settings.full:
        return found
    found |= {
        "r3": arm("r3", "paid for the task; SGD", "r3"),
        "r3_adam": arm("r3_adam", "paid for the task; Adam", "r3", rate=quick),
        "r2_kl": arm("r2_kl", f"paid by the sampled mention; KL penalty {SOME}", "r2", beta=SOME),
        "r2_within": arm(
            "r2_within", "its rewards permuted within each prompt", "r2", within=1
        ),
        "r2_across": arm("r2_across", "its rewards permuted across prompts", "r2", across=1),
        "r4": arm("r4", f"paid by the tone both questions share, ρ = {MENTION}", "r4"),
        "r5": arm("r5", "r2, then noise", "r2_off", start="r2"),
        "r5_kl": arm("r5_kl", f"r2, then noise with a KL penalty of {SOME}", "r2_off",
                     start="r2", beta=SOME),
    }  # fmt: skip
    for start in ("r0_mean", "r2", "r3"):
        found[f"relearn_{start}"] = _relearn(settings, start)
    return found


def _relearn(settings: Settings, start: str) -> Arm:
    """A capability that was never trained, trained at last: sure of one's own party."""
    task, train = settings.data.task, settings.train
    draw = partial(spillover.texts, task=task, only=spillover.PARTY, own=0.97)
    rate = partial(sgd, learning_rate=train.rate)
    steps = max(2, train.steps // 8)
    config = likelihood(
        f"relearn_{start}", sized(settings.model, task), draw, steps=steps, rows=train.rows,
        optimizer=rate, start=From(stage=start), mesh=settings.mesh,
    )  # fmt: skip
    look = partial(spillover_measures.drift, task=task)
    at = tuple(sorted({0, steps // 8, steps // 4, steps // 2}))
    return Arm(config, f"taught PARTY after {start}", at, look, ("base",))


def _gates(settings: Settings) -> dict[str, Arm]:
    """One path beside the trunk, which alone learns, behind gates of several widths."""
    task, train = settings.data.task, settings.train
    chance = chances(task)["r2"]
    beside = partial(sized, settings.model, task, Beside, side_mlp=settings.model.width)
    exact = partial(
        spillover_gates.gated, model=beside(), task=task, chance=chance,
        rates={"sgd": train.side_rate, "adam": train.adam_rate},
    )  # fmt: skip
    found = {"gates": Arm(exact, "only a path behind a gate learns; exact", needs=("base",))}
    if not settings.full:
        return found
    look = partial(spillover_measures.gated, task=task, chance=chance)
    for gate in spillover_gates.GATES:
        name = gate_name(gate)
        rate = partial(side_only, learning_rate=train.side_rate)
        config = run(name, settings, "r2", rate=rate, model=beside(side_gate=gate))
        says = f"only a path with gate {gate:g} learns, from samples; SGD"
        found[name] = Arm(config, says, (0,), look)
    return found


def _tables(settings: Settings) -> dict[str, Arm]:
    """Where drift has closed forms: correlation, then noise without and with KL."""
    table = settings.data.table
    make = partial(spillover_table.run, table=table, mesh=settings.mesh)
    look = partial(spillover_table.drift, answers=table.answers)
    parts = [table.steps * i // 10 for i in range(1, 10)]
    later = [table.after * i // 10 for i in range(10)]

    def arm(config, says, at):
        return Arm(config, says, tuple(sorted(set(at))), look)

    return {
        "table": arm(
            make("table", strength=table.correlation),
            f"a table, paid by the sampled half, ρ = {table.correlation:g}", [*parts, 1],
        ),
        "table_noise": arm(
            make("table_noise", strength=0.0, start="table"), "then noise", later
        ),
        "table_kl": arm(
            make("table_kl", strength=0.0, start="table", beta=table.beta),
            f"then noise with a KL penalty of {table.beta:g}", later,
        ),
    }  # fmt: skip
