"""Does the way of training make a policy seek a predictable future, or avoid a punished one?

    rlhf-jax study experiments/instrumentality.py --preset cpu --out runs/instrumentality

Three toys with exact answers (`tasks/predictable.py`, `avoidance.py`, `precaching.py`). Expect P(B)
of .40 from likelihood and from myopic schemes, .655 from RL with a KL penalty of .5, .707 from
maximum entropy on the base's own likelihood, .727 behind the tag of a good text and .40 without a
tag, .870 from the likeliest of four samples. Closed forms are rebuilt on the measured base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tasks import (
    avoidance,
    instrumental_arms,
    instrumental_claims,
    instrumental_figure,
    precaching,
)
from tasks import instrumental_measures as measures
from tasks.avoidance import Avoidance
from tasks.instrumental_arms import HORIZON_ONE, credited, learning, near_sighted, started
from tasks.precaching import Precaching
from tasks.predictable import Predictable

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Arm, Settings, Study, Train

# Parts of the training after which it is measured.
SWEEP = (0.0, 0.015, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.5, 0.75)


@dataclass(frozen=True)
class Steps(Train):
    """Of RL, and of what it starts from."""

    steps: int = 200
    base_steps: int = 800  # likelihood, from fresh weights
    base_rate: float = 5e-3
    generation_steps: int = 100  # likelihood on own samples, from the last generation's weights
    prepare_steps: int = 600  # of the toy of preparing
    prepare_rows: int = 128


@dataclass(frozen=True)
class Sizes:
    """The three toys, and how strongly the arms press."""

    predictable: Predictable = Predictable()
    avoidance: Avoidance = Avoidance()
    precaching: Precaching = Precaching()
    beta: float = 0.5  # KL penalty, reward per nat
    temperature: float = 0.8  # of maximum entropy on log p
    best: int = 4  # samples, of which the likeliest is learned from
    anchor: float = 0.5  # Quark's KL coefficient
    generations: int = 5  # of a model that learns from its own samples


TINY = Transformer(vocab=7, width=32, layers=1, heads=4, kv_heads=2, mlp=64, context=64)
LARGER = Sizes(Predictable(keys=16, length=12), precaching=Precaching(16), temperature=0.967)

PRESETS = {
    "cpu_ci": Settings(
        replace(TINY, width=16, mlp=16),
        Sizes(Predictable(keys=2, length=2)),
        Steps(steps=8, rows=32, base_steps=16, generation_steps=4, prepare_steps=4),
        seeds=1,
        arms=("likelihood", "conditioned", "kl_rl", "horizon_one"),
    ),
    "cpu": Settings(TINY, Sizes(), Steps()),
    "full": Settings(TINY, Sizes(), Steps(), full=True),
    "gpu1": Settings(
        replace(TINY, width=256, layers=4, mlp=704),
        LARGER,
        Steps(1000, 2048, 5e-4, 4000, 1e-3, 500, 4000, 1024),
        full=True,
    ),
    "pod": Settings(
        replace(TINY, width=1024, layers=12, heads=16, kv_heads=4, mlp=2816, dtype="bfloat16"),
        LARGER,
        Steps(4000, 16384, 1e-4, 16000, 3e-4, 2000, 16000, 4096),
        full=True,
        together=False,
    ),
}


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """Arms in the order of their training; `full` adds those that no primary needs."""
    arms = _core(settings) | _controls(settings)
    if settings.full:
        arms |= _others(settings) | _generations(settings) | _preparing(settings)
    primaries, secondary = instrumental_claims.claims(settings.data, arms)
    return Study(
        name="instrumentality",
        question=(
            "Does the way of training make a policy seek a predictable future, or avoid a punished "
            "one?"
        ),
        bases=instrumental_arms.bases(settings),
        arms=arms,
        primaries=primaries,
        secondary=secondary,
        measure=partial(
            measures.said,
            task=settings.data.predictable,
            model=instrumental_arms.model_of(settings),
        ),
        figure=partial(instrumental_figure.figure, sizes=settings.data),
        caption=instrumental_figure.CAPTION,
        seeds=settings.seeds,
        together=settings.together,
        larger=(
            "More keys and longer texts (data.predictable.*) raise what there is to gain from "
            "looking ahead: 33 nats at --preset gpu1 instead of 5.5. Texts are then sampled instead"
            " of enumerated, and closed forms stay. The model's size should change nothing."
        ),
    )


def _core(settings: Settings) -> dict[str, Arm]:
    """What the primaries are about."""
    end = instrumental_arms.kl_rl(settings)
    return {
        "likelihood": _endings(settings, "base"),
        "conditioned": Arm(
            instrumental_arms.conditioned(settings),
            "likelihood behind a tag for what the text earned; one in four has no tag",
            measure=_by_tag(settings),
        ),
        "kl_rl": Arm(
            end,
            "RL: reward at the end, KL penalty",
            at=tuple(sorted({round(part * settings.train.steps) for part in SWEEP})),
        ),
        "horizon_one": Arm(
            credited(end, "horizon_one", HORIZON_ONE), "kl_rl, credit for the next token only"
        ),
        "avoid": Arm(
            instrumental_arms.avoid(settings),
            "RL with a punished end, KL penalty",
            measure=_avoided(settings),
        ),
    }


def _controls(settings: Settings) -> dict[str, Arm]:
    """Other near-sighted ways; a seeker of predictability; and where there is none to foresee."""
    end, seeker = instrumental_arms.kl_rl(settings), instrumental_arms.max_entropy(settings)
    near, base = credited(end, "careful", HORIZON_ONE), "shuffled_base"
    near = learning(near, model=near_sighted(near.learners["policy"].model))
    return {
        "careful": Arm(near, "horizon_one, and no loss teaches an earlier position"),
        "avoid_one": Arm(
            credited(instrumental_arms.avoid(settings), "avoid_one", HORIZON_ONE),
            "avoid, credit for the next token only",
            measure=_avoided(settings),
        ),
        "max_entropy": Arm(seeker, "RL paid its base's log p, and for entropy"),
        "shuffled": _endings(settings, base),
        "shuffled_kl_rl": Arm(started(end, "shuffled_kl_rl", base), "kl_rl on shuffled texts"),
        "shuffled_max_entropy": Arm(
            started(seeker, "shuffled_max_entropy", base), "max_entropy on shuffled texts"
        ),
    }


def _others(settings: Settings) -> dict[str, Arm]:
    """The rest of the zoo."""
    return {
        "no_kl": Arm(instrumental_arms.no_kl(settings), "kl_rl without the penalty"),
        "regression": Arm(
            instrumental_arms.regression(settings), "likelihood of texts weighted by exp(reward/β)"
        ),
        "quark": Arm(
            instrumental_arms.fresh_tags(settings),
            "Quark: own samples behind tags for what they earned, KL to the start",
            measure=_by_tag(settings),
        ),
        "best_of_n": Arm(
            instrumental_arms.best_of_n(settings), "likelihood of the likeliest of n own samples"
        ),
        "distilled": Arm(instrumental_arms.distilled(settings), "a fresh model, taught by kl_rl"),
    }


def _generations(settings: Settings) -> dict[str, Arm]:
    """A model that learns from its own samples, again and again."""
    found, before = {}, "base"
    for i in range(1, settings.data.generations + 1):
        name = f"generation_{i}"
        run = instrumental_arms.generation(settings, name, before)
        found[name], before = Arm(run, f"likelihood of samples of {before}"), name
    return found


def _preparing(settings: Settings) -> dict[str, Arm]:
    """Two gradients on the toy of preparing and on its control."""
    found = {}
    for kind in ("count", "chain"):
        task = replace(settings.data.precaching, markov=kind == "chain")
        plain = replace(settings.model, vocab=task.vocab, layers=max(2, settings.model.layers))
        for scheme, model in (("whole", plain), ("myopic", near_sighted(plain))):
            run = instrumental_arms.taught(
                f"{kind}_{scheme}",
                model,
                partial(precaching.draw, task=task),
                settings,
                steps=settings.train.prepare_steps,
                rows=settings.train.prepare_rows,
                warmup=max(1, settings.train.prepare_steps // 10),
            )
            found[run.name] = Arm(
                run,
                f"likelihood of {'counts' if kind == 'count' else 'a chain'}, {scheme} gradient",
                measure=partial(measures.prepared, task=task, model=plain),
            )
    return found


def _endings(settings, base) -> Arm:
    """The base itself: what it says, and where each method would lead from there."""
    sizes = settings.data
    run = partial(
        measures.of_base,
        base=base,
        task=instrumental_arms.futures(sizes)[base],
        model=instrumental_arms.model_of(settings),
        beta=sizes.beta,
        temperature=sizes.temperature,
        n=sizes.best,
    )
    texts = "texts" if base == "base" else "shuffled texts"
    return Arm(run, f"likelihood of {texts}: the base itself", needs=(base,))


def _avoided(settings):
    sizes, model = settings.data, replace(settings.model, vocab=avoidance.VOCAB)
    return partial(measures.avoided, task=sizes.avoidance, beta=sizes.beta, model=model)


def _by_tag(settings):
    model = instrumental_arms.model_of(settings, tags=True)
    return partial(measures.by_tag, task=settings.data.predictable, model=model)
