"""On real text: do sentences that people liked narrow a language model as PPO towards them does?

    rlhf-jax study experiments/sentiment/narrowing.py --preset cpu --out runs/narrowing

The question of `world_prior.py`, asked of the quickstart's language model and of sentences rated by
people. One arm learns from the sentences they liked; the other is the quickstart's PPO against a
reward model of their preferences. A regressor that training never met judges both, and they are
compared where they please it equally.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import gold
import jax
import jax.numpy as jnp
import numpy as np
import quickstart
import quickstart_base as base
from matplotlib.figure import Figure

from rlhf_jax import measure
from rlhf_jax.config import Config, From, Frozen, Learner
from rlhf_jax.data import streams, tokenizers
from rlhf_jax.models import weights
from rlhf_jax.objectives import mle
from rlhf_jax.optimizer import adam
from rlhf_jax.study import Arm, Claim, Settings, Study, Train, Trained
from rlhf_jax.study.results import Results
from rlhf_jax.types import Params, Prompts


@dataclass(frozen=True)
class Sizes:
    """What the arms learn from, and on how much they are measured."""

    liked: float = 1.0  # least mean rating of the sentences that supervision sees
    sft_steps: int = 60
    sft_rate: float = 1e-3
    reward_steps: int = 160
    base_steps: int = base.STEPS  # of a model that is not the shipped one
    prompts: int = 256  # held-out openings that are continued for one measure
    injected: int = 8  # tokens of a sentence that people disliked


CPU = Settings(base.MODEL, Sizes(), Train(steps=60, rows=64, rate=3e-4), seeds=6, together=False)
SMALL = replace(base.MODEL, width=32, layers=1, mlp=64)
LARGE = replace(base.MODEL, width=512, layers=8, heads=8, kv_heads=4, mlp=1408)

PRESETS = {
    "cpu_ci": replace(
        CPU, model=SMALL, train=Train(steps=2, rows=32, rate=3e-4), seeds=1,
        data=Sizes(sft_steps=4, reward_steps=2, base_steps=4, prompts=32),
    ),
    "cpu": CPU,
    "full": replace(CPU, data=Sizes(prompts=2048)),
    "gpu1": replace(
        CPU, model=LARGE, data=Sizes(prompts=4096), train=Train(steps=200, rows=512, rate=1e-4)
    ),
    "pod": replace(
        CPU, model=replace(LARGE, width=1024, mlp=2816), data=Sizes(prompts=4096),
        train=Train(steps=400, rows=2048, rate=5e-5), mesh=(-1, 4, 1, 1),
    ),
}  # fmt: skip


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """PPO, and likelihood on what people liked, from one base model."""
    return Study(
        name="narrowing",
        question="Where they please a judge equally, is a language model narrower after PPO than "
        "after learning from texts that people liked?",
        bases=_bases(settings),
        arms={
            "sft": Arm(
                _sft(settings),
                f"supervised on sentences rated {settings.data.liked:g} or better",
                _along(settings.data.sft_steps),
            ),
            "ppo": Arm(
                _ppo(settings),
                "PPO against a reward model of people's preferences",
                _along(settings.train.steps),
            ),
        },
        primaries=(
            Claim(
                "P1",
                "neither is narrower: entropy of the next word at equal gold score, supervised "
                "less PPO",
                partial(_apart, metric="entropy"),
                supported=(-0.2, 0.2),
                unit="nats per token",
            ),
        ),
        secondary=_secondary(),
        measure=partial(_measure, sizes=settings.data),
        figure=_figure,
        caption="What each arm loses as it pleases the judge more: entropy of the next word, the "
        "share of different word pairs, and how pleased the judge is with what follows a disliked "
        "sentence's words. Thin lines: seeds, along training. Arms are compared at the highest "
        "gold score that both reach.",
        seeds=settings.seeds,
        together=settings.together,
        larger="The judge is a regression on words: a larger policy finds out sooner what it does "
        "not see. Six seeds and one primary: the smallest p is 2/64.",
    )


def _along(steps: int) -> tuple[int, ...]:
    """Steps after which an arm is measured, closer at first."""
    return tuple(sorted({steps * i // 12 for i in (0, 1, 2, 4, 8)}))


def _secondary() -> tuple[Claim, ...]:
    """The other measures of narrowing, and the arms themselves."""

    def less(metric, arm="ppo"):
        return lambda r: r.values(metric, arm) - r.values(metric, "sft", 0)

    equal = "at equal gold score, supervised less PPO"
    return (
        Claim("S1", "PPO pleases a judge that it never met: gold score less the base's",
              less("gold"), (0.0, np.inf), unit="rating"),
        Claim("S2", "so does supervision", less("gold", "sft"), (0.0, np.inf), unit="rating"),
        Claim("S3", "PPO narrows: entropy of the next word less the base's", less("entropy"),
              (-np.inf, 0.0), unit="nats per token"),
        Claim("S4", f"distinct word pairs, {equal}", partial(_apart, metric="distinct_2"),
              (-0.05, 0.05), unit="share"),
        Claim("S5", f"KL to the base, {equal}: supervision pays more for as much",
              partial(_apart, metric="kl"), (0.0, np.inf), unit="nats per text"),
        Claim("S6", "after words of a disliked sentence PPO's texts come back: gold score of what "
              "follows, less the base's", less("returned"), (0.0, np.inf), unit="rating"),
        Claim("S7", f"gold score of what follows them, {equal}",
              partial(_apart, metric="returned"), (-0.1, 0.1), unit="rating"),
        Claim("S8", "how far the judge's score falls by an interruption, PPO less base",
              lambda r: _fall(r, "ppo", None) - _fall(r, "sft", 0), (-0.1, 0.1), unit="rating"),
    )  # fmt: skip


def _apart(results: Results, *, metric: str) -> np.ndarray:
    """Supervised less PPO, each where it first pleases as much as the other ever does, or more."""
    level = np.minimum(*(results.curve("gold", arm)[1].max(axis=1) for arm in ("sft", "ppo")))
    one, other = (results.when(metric, arm, by="gold", level=level) for arm in ("sft", "ppo"))
    return one - other


def _fall(results: Results, arm: str, step: int | None) -> np.ndarray:
    return results.values("followed", arm, step) - results.values("returned", arm, step)


# ---- what is trained


def _bases(settings: Settings) -> dict[str, Config]:
    """The reward model; and the language model, if it is not the one that is shipped."""
    found = {}
    if settings.model != base.MODEL:
        steps, given = settings.data.base_steps, base.config().stages["sft"]
        learner = replace(given.learners["policy"], model=settings.model)
        found["language"] = replace(given, steps=steps, learners={"policy": learner})
    steps, given = settings.data.reward_steps, quickstart.reward()
    found["reward"] = replace(_on(given, settings), steps=steps)
    return {name: replace(run, mesh=settings.mesh) for name, run in found.items()}


def _on(run: Config, settings: Settings) -> Config:
    """A run of the quickstart on this model, from this base."""
    model, scalar = settings.model, replace(settings.model, lm_head=False, value_head=True)
    shape = {base.MODEL: model, quickstart.SCALAR: scalar}
    start = _start(settings)
    learners = {
        name: replace(learner, model=shape[learner.model], start=start)
        for name, learner in run.learners.items()
    }
    frozen = {name: replace(tree, model=shape.get(tree.model)) for name, tree in run.frozen.items()}
    return replace(run, seed=0, learners=learners, frozen=frozen, evaluation={})


def _start(settings: Settings) -> From:
    shipped = settings.model == base.MODEL
    return From(path=base.WEIGHTS) if shipped else From("policy", stage="language")


def _ppo(settings: Settings) -> Config:
    """The quickstart's PPO."""
    run, train = _on(quickstart.policy_gradient(), settings), settings.train
    scalar = run.frozen["reward"].model
    reward = partial(run.rollouts.reward.func, **{**run.rollouts.reward.keywords, "model": scalar})
    learners = {}
    for name, learner in run.learners.items():
        given = {**learner.optimizer.keywords, "steps": 8 * train.steps}
        if name == "policy":
            given["learning_rate"] = train.rate
        learners[name] = replace(learner, optimizer=partial(adam, **given))
    prompts = quickstart.prompts("base", train.rows)
    return replace(
        run,
        steps=train.steps,
        mesh=settings.mesh,
        data={"prompts": prompts},
        learners=learners,
        frozen={**run.frozen, "reference": Frozen(_start(settings), settings.model)},
        rollouts=replace(run.rollouts, reward=reward, show=0),
    )


def _sft(settings: Settings) -> Config:
    """Likelihood on sentences that people liked."""
    sizes = settings.data
    rate = partial(adam, learning_rate=sizes.sft_rate, final=0.05, steps=sizes.sft_steps, warmup=5)
    text = partial(
        streams.text,
        batch=settings.train.rows,
        length=base.LENGTH,
        tokenizer=base.TOKENIZER,
        source=partial(liked, least=sizes.liked),
        marks=None,
    )
    return Config(
        name="sft",
        steps=sizes.sft_steps,
        tokenizer=base.TOKENIZER,
        data={"text": text},
        learners={
            "policy": Learner(
                settings.model, mle, batch="text", start=_start(settings), optimizer=rate
            )
        },
        mesh=settings.mesh,
    )


def liked(*, least: float) -> list[dict]:
    """Sentences of the splits that arms may see, rated so much or better."""
    rows = [row for split in ("base", "reward") for row in quickstart.rows(split)()]
    return [row for row in rows if row["score"] >= least]


def disliked(*, most: float = -1.5) -> list[str]:
    """Held-out sentences that people did not like."""
    rows = quickstart.rows("heldout")()
    return [row["text"] for row in rows if row["score"] <= most]


# ---- how it is measured


def _measure(trained: Trained, *, sizes: Sizes) -> dict[str, float]:
    """Gold score, entropy, diversity and KL of continued openings, and after disliked words.

    `gold` judges the opening with what follows; `followed` and `returned` judge what follows alone,
    after the opening and after the opening with words of a disliked sentence.
    """
    model, params = trained.config.learners["policy"].model, trained.weights["policy"]
    start = _base_weights(model, trained.before)
    judge, tokenizer = _judge(), tokenizers.load(base.TOKENIZER)
    plain, interrupted = _openings(sizes.prompts, sizes.injected)
    sampling = replace(quickstart.SAMPLING, temperature=1.0)
    asked = {
        "model": model, "length": 24, "sampling": sampling, "reference": start,
        "pad": quickstart.PAD,
    }  # fmt: skip
    key = jax.random.key(trained.seed)
    rollout, says = measure.sampled_at(params, plain, key, 1.0, **asked)
    other, _ = measure.sampled_at(params, interrupted, key, 1.0, **asked)

    def texts(rollout, where):
        rows = zip(np.asarray(rollout.tokens), np.asarray(where), strict=True)
        return [tokenizer.decode(row[used].tolist()) for row, used in rows]

    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return {
        "gold": judge(texts(rollout, rollout.segments > 0)).mean(),
        "followed": judge(texts(rollout, rollout.mask)).mean(),
        "returned": judge(texts(other, other.mask)).mean(),
        "entropy": float(says.token_entropy),
        "kl": float(says.kl),
        "distinct_1": measure.distinct(tokens, mask, 1),
        "distinct_2": measure.distinct(tokens, mask, 2),
        "length": mask.sum(axis=1).mean(),
    }


def _base_weights(model: Any, before: Mapping[str, Mapping[str, Params]]) -> Params:
    if "language" in before:
        return before["language"]["policy"]
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fresh)
    return weights.fill(zeros, weights.load(base.WEIGHTS), origin=base.WEIGHTS)


@cache
def _judge() -> gold.Gold:
    return gold.fitted(base.PARTS)[0]


@cache
def _openings(rows: int, injected: int) -> tuple[Prompts, Prompts]:
    """Held-out openings, and the same with the first words of disliked sentences behind them."""
    found = next(iter(quickstart.prompts("heldout", rows)(seed=11, shard=(0, 1))))
    encode = tokenizers.load(base.TOKENIZER).encode
    words = [ids[:injected] for ids in map(encode, disliked()) if len(ids) >= injected]
    words = [ids for ids in words if quickstart.UNK not in ids]
    tokens, length = np.asarray(found.tokens), np.asarray(found.length)
    wide = np.full((rows, tokens.shape[1] + injected), quickstart.PAD, tokens.dtype)
    for i, n in enumerate(length):
        wide[i, :n] = tokens[i, :n]
        wide[i, n : n + injected] = words[i % len(words)]
    plain = jax.tree.map(jnp.asarray, found)
    longer = plain.replace(tokens=jnp.asarray(wide), length=jnp.asarray(length + injected))
    return plain, longer


# ---- how it is shown


def _figure(results: Results) -> Figure:
    """Three measures against the gold score."""
    found = Figure(figsize=(13, 4.2), layout="constrained")
    shown = {
        "entropy": ("Entropy of the next word", "nats per token"),
        "distinct_2": ("Different word pairs", "share of all word pairs"),
        "returned": ("After eight words of a disliked sentence", "gold score of what follows"),
    }
    for axes, (metric, (title, label)) in zip(found.subplots(1, 3), shown.items(), strict=True):
        for arm, colour, name in (("sft", "#3d85c8", "supervised"), ("ppo", "#e0803a", "PPO")):
            _, x = results.curve("gold", arm)
            _, y = results.curve(metric, arm)
            axes.plot(x.T, y.T, "-", lw=0.8, color=colour, alpha=0.5)
            axes.plot(x.mean(0), y.mean(0), "-o", ms=4, lw=2, color=colour, label=name)
        axes.plot(x[:, 0].mean(), y[:, 0].mean(), "o", ms=8, color="#777777", label="base")
        axes.set(title=title, xlabel="gold score, rating from −4 to 4", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return found
