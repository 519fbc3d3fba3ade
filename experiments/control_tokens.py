"""A token that turns RLHF off, and good text asked for by a tag or trained for.

    rlhf-jax study experiments/control_tokens.py --preset cpu --out runs/control_tokens

Every target is built on what the trained base says: over all texts of the task or, where `data.*`
makes these too many, over texts drawn from known chains, with importance weights.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from tasks import tagged, tagged_exact, tagged_figure, tagged_fits, tagged_measures
from tasks.tagged import Tagged, sized
from tasks.tagged_arms import TrainTagged, conditioned, off_token

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.study import Arm, Claim, Settings, Study

SMALL = Transformer(vocab=1, width=32, layers=2, heads=4, kv_heads=2, mlp=64, context=32)
WIDE = Transformer(vocab=1, width=512, layers=8, heads=8, kv_heads=4, mlp=1408, context=64)
CPU = Settings(SMALL, Tagged(), TrainTagged(steps=400, rows=192, rate=4e-3))

PRESETS = {
    "cpu_ci": Settings(
        replace(SMALL, layers=1, width=16, mlp=32),
        Tagged(base_steps=40, base_rows=64),
        TrainTagged(steps=20, rows=64, rate=5e-3, texts=64, text_steps=20),
        seeds=1,
        arms=("anchored", "condition"),
    ),
    "cpu": CPU,
    "full": replace(CPU, full=True),
    "gpu1": Settings(
        replace(WIDE, width=256, layers=6, mlp=704),
        Tagged(letters=16, prompts=8, length=6, base_steps=3000, base_rows=2048, base_rate=1e-3),
        TrainTagged(steps=2000, rows=2048, rate=5e-4, texts=8192, text_steps=4000),
        full=True,
    ),
    "pod": Settings(
        WIDE,
        Tagged(letters=32, prompts=8, length=12, texts=16384, base_steps=5000, base_rows=8192,
               base_rate=1e-3),
        TrainTagged(steps=4000, rows=8192, rate=3e-4, texts=32768, text_steps=8000),
        full=True,
        together=False,
    ),
}  # fmt: skip

SAYS = {
    "gate": "RL behind ON; OFF is never sampled",
    "anchored": "half of the samples behind OFF, which only the KL anchor teaches",
    "scrambled": "feedback off for half of the prompts, whatever the tag",
    "untagged": "RL without any tag",
    "ignored": "half of the samples behind OFF, nothing teaches them",
    "ignored_tenth": "a tenth of the samples behind OFF, nothing teaches them",
    "anchored_tenth": "a tenth of the samples behind OFF, with the KL anchor",
    "flipped": "ON and OFF, exchanged in the midst of half of the texts; anchored",
    "condition": "asked for by GOOD: likelihood, tags by what people say, dropped from 10 %",
    "weighted": "likelihood weighted by σ(r)",
    "kl_rl": "RL with reward log σ(r) and a KL penalty of 1",
    "no_kl": "RL with that reward and no KL penalty",
    "condition_rarely_dropped": "asked for by GOOD, tags dropped from 1 %",
    "condition_crisp": "asked for by GOOD: tags by whether r is in the upper quarter",
    "second_round": "asked for by GOOD, learned from samples behind the first round's GOOD",
    "quantiles": "four tags by the quantile of r",
    "quark": "four tags by the quantile of r among fresh samples behind the best (Quark)",
    "returns": "a tag before each letter: the return to go",
    "advantage_weighted": "likelihood weighted by σ(r)/e^V",
    "filtered": "likelihood of texts with r in the upper quarter",
    "gate_long": "RL behind ON on longer texts of more prompts",
    "compared": "asking, weighing, KL-RL and the posterior, side by side",
    "fits": "the policy of gate_long by fewer weights of its base: a bias, the output matrix, …",
}


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """All arms, what is measured of each, and what is claimed."""
    task, model = settings.data, sized(settings.model, settings.data)
    base = partial(tagged.base, model=settings.model, mesh=settings.mesh)
    runs, bases = off_token(settings) | conditioned(settings), {"base": base(task)}
    looks, long = measures(task), tagged_fits.longer(settings).data
    if settings.full:
        runs["gate_long"] = tagged_fits.gate_long(settings)
        bases["base_long"] = replace(base(long), name="base_long")
        looks["gate_long"] = partial(tagged_measures.off_token, task=long, start="base_long")
    arms = {name: Arm(run, SAYS[name], measure=looks[name]) for name, run in runs.items()}
    compared = partial(tagged_measures.compared, task=task, model=model)
    needs = ("base", "condition", "weighted", "kl_rl")
    arms["compared"] = Arm(compared, SAYS["compared"], needs=needs)
    if settings.full:
        fits = partial(tagged_fits.fits, task=long, model=sized(settings.model, long))
        arms["fits"] = Arm(fits, SAYS["fits"], needs=("base_long", "gate_long"))
    return Study(
        name="control_tokens",
        question="Can one token switch RLHF off, and is asking for good text by a token the same "
        "as training for it?",
        bases=bases,
        arms=arms,
        primaries=PRIMARIES,
        secondary=secondary(settings),
        measure=partial(tagged_measures.off_token, task=task),
        figure=tagged_figure.figure,
        caption=tagged_figure.CAPTION,
        seeds=settings.seeds,
        together=settings.together,
        larger="--preset full runs every arm, gpu1 and pod wider models and longer texts of more "
        "letters; --set data.letters=16 data.length=6 needs no more than that. Where texts are "
        "too many to enumerate, distances are estimated on data.texts of them for each x.",
    )


def measures(task: Tagged) -> dict[str, object]:
    """What is measured of each trained arm."""
    kit, edges = tagged_measures, tagged_exact.quantiles(task, (0.25, 0.5, 0.75))
    look = partial(kit.off_token, task=task)
    good, called = partial(kit.good_text, task=task), partial(kit.called, task=task)
    found = dict.fromkeys(("gate", "scrambled", "ignored", "ignored_tenth", "anchored_tenth"), look)
    found |= {
        "anchored": partial(kit.switch, task=task),
        "untagged": partial(look, asked=None),
        "flipped": partial(kit.flipped, task=task),
        "condition": called,
        "condition_rarely_dropped": called,
        "condition_crisp": partial(good, tag="GOOD", least=edges[2]),
        "second_round": partial(good, tag="GOOD", rounds=2),
        "filtered": partial(good, least=edges[2]),
        "returns": partial(kit.on_request, task=task, edges=edges),
    }
    found |= dict.fromkeys(("weighted", "kl_rl", "no_kl", "advantage_weighted"), good)
    found |= dict.fromkeys(("quantiles", "quark"), partial(kit.binned, task=task, edges=edges))
    return found


# ---- what is claimed


def of(metric: str, arm: str):
    """A metric of an arm at its end, by seed."""
    return lambda r: r.values(metric, arm)


PRIMARIES = (
    Claim(
        "P1",
        "behind OFF, anchored there, the policy is the base: at most 5 % of ON's KL",
        of("leak", "anchored"),
        supported=(-np.inf, 0.05),
        possible=(-np.inf, 0.25),
        unit="KL behind OFF / KL behind ON",
    ),
    Claim(
        "P2",
        "a gate alone leaks: behind an OFF that was never sampled more than half of ON's KL",
        of("leak", "gate"),
        supported=(0.5, np.inf),
        unit="KL behind OFF / KL behind ON",
    ),
    Claim(
        "P3",
        "asking for good text, weighing by σ(r), RL with log σ(r) at a KL price of 1 and the "
        "posterior coincide",
        of("most", "compared"),
        supported=(-np.inf, 0.03),
        unit="largest total variation of two",
    ),
    Claim(
        "P4",
        "conditioning leaves the rest alone: without the tag, or over both tags, it is the base",
        of("marginal", "condition"),
        supported=(-np.inf, 0.02),
        unit="largest total variation",
    ),
    Claim(
        "P5",
        "a tag that has nothing to do with the gate dilutes: π₀ exp(r/2β)/Z behind either",
        lambda r: (
            (r.values("to_diluted_ON", "scrambled") + r.values("to_diluted_OFF", "scrambled")) / 2
        ),
        supported=(-np.inf, 0.03),
        unit="total variation to the law",
    ),
    Claim(
        "P6",
        "without a KL penalty the same reward leads away from the posterior",
        of("to_posterior", "no_kl"),
        supported=(0.1, np.inf),
        possible=(0.03, np.inf),
        unit="total variation",
    ),
)


def secondary(settings: Settings) -> tuple[Claim, ...]:
    """Estimates without a verdict."""
    rows = [
        ("the base does not know the tags: KL between ON and OFF",
         of("base_on_off", "anchored"), (-np.inf, 1e-3), "nats"),
        ("behind ON the anchored policy is the tilt π₀ exp(r/β)/Z",
         of("to_tilt_ON", "anchored"), (-np.inf, 0.05), "total variation"),
        ("asked for GOOD, it earns what the posterior earns: some texts were lucky",
         of("luck", "condition"), (-0.05, 0.05), "E[r] less the posterior's"),
        ("the first block has read the tag: pasted behind it, the tag restores less than half",
         lambda r: r.vector("restored_tag", "anchored")[:, 1], (-np.inf, 0.5),
         "share of KL restored"),
        ("behind ON the gate's policy is that tilt, too", of("to_tilt_ON", "gate"),
         (-np.inf, 0.05), "total variation"),
        ("without a KL penalty more is earned than behind GOOD",
         lambda r: r.values("reward", "no_kl") - r.values("reward", "condition"),
         (0.0, np.inf), "difference in E[r]"),
    ]  # fmt: skip
    if settings.full:
        rows += [
            ("samples behind OFF that nothing teaches change no leak",
             lambda r: r.values("leak", "ignored") - r.values("leak", "gate"), (-0.1, 0.1),
             "difference in leak"),
            ("an anchor on a tenth of the samples is enough", of("leak", "anchored_tenth"),
             (-np.inf, 0.05), "KL behind OFF / KL behind ON"),
            ("trained without tags, the policy does not know what OFF is", of("leak", "untagged"),
             (0.5, np.inf), "KL behind OFF / KL without tag"),
            ("one letter after OFF, in the midst of a text, KL is below a tenth of ON's",
             lambda r: r.vector("share_after_off", "flipped")[:, 0], (-np.inf, 0.1),
             "share of ON's KL"),
            ("a second round multiplies: π₀ σ(r)²", of("to_posterior", "second_round"),
             (-np.inf, 0.04), "total variation"),
            ("tags dropped from 1 % do as well", of("marginal", "condition_rarely_dropped"),
             (-np.inf, 0.02), "largest total variation"),
            ("weighing by the advantage ends there too", of("to_posterior", "advantage_weighted"),
             (-np.inf, 0.03), "total variation"),
            ("asking for the upper quarter is filtering", of("to_posterior", "condition_crisp"),
             (-np.inf, 0.05), "total variation"),
            ("and filtering ends at the base given that quarter", of("to_posterior", "filtered"),
             (-np.inf, 0.05), "total variation"),
            ("four quantiles: what is asked for is reached", of("spearman", "quantiles"),
             (0.9, np.inf), "rank correlation"),
            ("returns to go: the same", of("spearman", "returns"), (0.9, np.inf),
             "rank correlation"),
            *((f"{what} says what RL does: KL that is left", of(name, "fits"), bounds,
               "share of the policy's KL")
              for name, what, bounds in (
                  ("head", "another output matrix on the base's features", (-np.inf, 0.2)),
                  ("bias", "a bias of the logits", (-np.inf, 0.2)),
                  ("last_block", "the base's last block", (-np.inf, 0.2)),
                  ("rank_1", "a term of rank 1 beside every matrix", (-np.inf, 0.2)),
                  ("rank_4", "a term of rank 4 beside every matrix", (-np.inf, 0.2)),
                  ("whole", "the whole base (what the search leaves)", (-np.inf, 0.02)))),
        ]  # fmt: skip
    return tuple(
        Claim(f"S{i}", says, value, supported=bounds, unit=unit)
        for i, (says, value, bounds, unit) in enumerate(rows, 1)
    )
