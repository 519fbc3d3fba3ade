"""The figure of `instrumentality.py`: P(B) by way of training, and three small panels."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf_jax.study.results import Results
from rlhf_jax.study.statistics import bootstrap_t
from tasks.instrumental_claims import quark_ending

FAMILIES = {
    "given texts": "#4477aa",
    "RL, credit to the start": "#cc3311",
    "RL, credit for one token": "#228833",
    "samples of a model": "#aa3377",
    "shuffled texts: nothing to foresee": "#999999",
}
TEXTS, FAR, NEAR, SAMPLES, CONTROL = FAMILIES
CAPTION = (
    "Left: P(B), the share of the less likely start whose future is certain, after each way of "
    "training. Dots are means over seeds with 95 % intervals, often narrower than the dot; diamonds"
    " are where theory says it ends, built on the measured base where there is one. Right: P(B) of "
    "RL with a KL penalty as it trains, a thin line for each seed; how far the two tokens of the "
    "other toy moved, where the second is punished nine times of ten after the start C; and, if it "
    "was run, what a gradient costs that later losses do not shape."
)


def _rows(sizes):
    """Arm, what it is called, metric, where it ends (None: theory does not say), family."""
    future, task = sizes.predictable.future, sizes.predictable

    def data(x):
        return lambda r: np.array([x])

    def ending(name, of="likelihood"):
        return lambda r: r.values(name, of)

    def quark(r):
        base = r.values("share", "conditioned").mean()
        return np.array([quark_ending(base, keys=task.keys, anchor=sizes.anchor)])

    last = f"generation_{sizes.generations}"
    return (
        ("likelihood", "likelihood", "base", data(future.likelihood()), TEXTS),
        ("conditioned", "conditioned, no tag", "share", data(future.likelihood()), TEXTS),
        ("conditioned", "conditioned, good tag", "good_share", data(future.conditioned()), TEXTS),
        ("regression", "reward-weighted", "share", data(future.tilted(sizes.beta)), TEXTS),
        ("kl_rl", f"KL-RL, β = {sizes.beta:g}", "share", ending("tilted"), FAR),
        ("no_kl", "RL without KL", "share", None, FAR),
        ("max_entropy", f"max. entropy on log p, τ = {sizes.temperature:g}", "share",
         ending("sequence"), FAR),
        ("horizon_one", "KL-RL, horizon 1", "share", ending("base"), NEAR),
        ("careful", "KL-RL, horizon 1, myopic gradient", "share", ending("base"), NEAR),
        ("quark", f"Quark, good tag, c = {sizes.anchor:g}", "good_share", quark, SAMPLES),
        ("best_of_n", f"likeliest of {sizes.best}, learned", "share", ending("best"), SAMPLES),
        ("distilled", "KL-RL, distilled from scratch", "share", ending("share", "kl_rl"), SAMPLES),
        (last, f"own samples, {sizes.generations} generations", "share", ending("base"), SAMPLES),
        ("shuffled_kl_rl", "KL-RL, shuffled", "share", ending("base", "shuffled"), CONTROL),
        ("shuffled_max_entropy", "max. entropy, shuffled", "share", ending("token", "shuffled"),
         CONTROL),
    )  # fmt: skip


def figure(results: Results, *, sizes) -> Figure:
    """What was run of the zoo, and of the panels."""
    panels = [
        draw
        for draw, needs in (
            (_strength, ("kl_rl", "likelihood")),
            (_abrupt, ("avoid", "avoid_one")),
            (_prepared, ("count_whole", "count_myopic", "chain_whole", "chain_myopic")),
        )
        if set(needs) <= set(results.arms)
    ]
    found = Figure(figsize=(11, 6.4), layout="constrained")
    grid = found.add_gridspec(max(1, len(panels)), 2, width_ratios=(1.45, 1))
    _zoo(found.add_subplot(grid[:, 0]), results, sizes)
    for i, draw in enumerate(panels):
        axes = found.add_subplot(grid[i, 1])
        draw(axes, results, sizes)
        axes.spines[["top", "right"]].set_visible(False)
    return found


def _zoo(axes, r, sizes):
    rows = [row for row in _rows(sizes) if row[0] in r.arms]
    rows.sort(key=lambda row: r.values(row[2], row[0]).mean())
    for y, (arm, _, metric, ends, family) in enumerate(rows):
        x, colour = r.values(metric, arm), FAMILIES[family]
        if ends is not None:
            axes.plot(ends(r).mean(), y, "D", ms=11, mfc="none", mec="black", mew=1)
        low, high = bootstrap_t(x)
        axes.plot([low, high], [y, y], "-", color=colour, lw=2.5, solid_capstyle="butt")
        axes.plot(x.mean(), y, "o", color=colour, ms=5.5)
        axes.annotate(f"{x.mean():.3f}", (1.005, y), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8, color=colour)  # fmt: skip
    share = 1 - sizes.predictable.first
    axes.axvline(share, color="black", lw=0.8, ls=":", zorder=0)
    axes.set_yticks(range(len(rows)), [row[1] for row in rows], fontsize=9)
    axes.set(xlim=(0, 1), ylim=(-0.7, len(rows) - 0.3), xlabel="P(B), the predictable start")
    axes.set_title("Who seeks a predictable future?", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    used = [family for family in FAMILIES if any(row[4] == family for row in rows)]
    marks = [Line2D([], [], marker="o", ls="-", color=FAMILIES[f], label=f) for f in used]
    marks += [
        Line2D(
            [],
            [],
            marker="D",
            ls="",
            mfc="none",
            mec="black",
            ms=9,
            label="where theory says it ends",
        ),
        Line2D([], [], color="black", lw=0.8, ls=":", label="the texts"),
    ]
    axes.legend(handles=marks, fontsize=8, frameon=False, loc="lower right")


def _strength(axes, r, sizes):
    steps, share = r.curve("share", "kl_rl")
    axes.plot(steps, share.T, color=FAMILIES[FAR], lw=0.7, alpha=0.4)
    axes.plot(steps, share.mean(0), "o-", color=FAMILIES[FAR], ms=3.5, label="KL-RL, mean of seeds")
    for ending, style, label in (
        ("early", "-.", "theory: only the first token learns"),
        ("tilted", "--", "theory: all tokens learn"),
        ("base", ":", "the base"),
    ):
        share = r.values(ending, "likelihood").mean()
        axes.axhline(share, color="black", lw=0.9, ls=style, label=label, zorder=0)
    axes.set(xlabel="steps of RL", ylabel="P(B)")
    axes.set_title("P(B) while RL trains", loc="left", fontsize=10)
    axes.legend(fontsize=7.5, edgecolor="none", loc="lower right", bbox_to_anchor=(1, 0.1))


def _abrupt(axes, r, sizes):
    """Both tokens' KL under two horizons."""
    theory, ticks, labels = sizes.avoidance.future, [], []
    for i, (arm, name, family, ends) in enumerate(
        (
            ("avoid", "credit to the start", FAR, theory.full(sizes.beta)),
            ("avoid_one", "credit for one token", NEAR, theory.myopic(sizes.beta)),
        )
    ):
        exact = theory.divergences(ends.start, sizes.beta)
        for j, token in enumerate(("first", "last")):
            x, at = r.values(f"kl_{token}", arm), i + 0.4 * (j - 0.5)
            axes.bar(at, x.mean(), 0.36, color=FAMILIES[family], alpha=(0.85, 0.5)[j])
            axes.plot([at, at], bootstrap_t(x), color="black", lw=1.2)
            axes.plot(at, exact[j], "D", ms=8, mfc="none", mec="black", mew=1, clip_on=False)
        share = r.values("share", arm).mean()
        ticks += [i - 0.2, i, i + 0.2]
        labels += ["start", f"\n{name}\nP(C) = {share:.3f}", "end"]
    axes.set_xticks(ticks, labels, fontsize=8.5)
    axes.tick_params(axis="x", length=0, pad=6)
    axes.set(ylabel="KL to the base, nats", xlim=(-0.6, 1.6))
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.set_title("A punished end: avoided, or met abruptly", loc="left", fontsize=10)


def _prepared(axes, r, sizes):
    """What myopic descent loses."""
    names = {"count": "a count, asked for\nafter a delay", "chain": "a chain, nothing\nto prepare"}
    for i, kind in enumerate(names):
        gap = r.values("loss", f"{kind}_myopic") - r.values("loss", f"{kind}_whole")
        low, high = bootstrap_t(gap)
        axes.bar(i, gap.mean(), 0.5, color=(FAMILIES[SAMPLES], FAMILIES[CONTROL])[i], alpha=0.75)
        axes.plot([i, i], [low, high], color="black", lw=1.2)
        axes.annotate(f"{gap.mean():.3f}", (i, max(gap.mean(), high, 0)), (0, 2),
                      textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
    axes.set_xticks(range(2), names.values(), fontsize=8.5)
    axes.set(ylabel="myopic − whole, nats", xlim=(-0.7, 1.7))
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), high + 0.12 * (high - low))
    axes.set_title("What a myopic gradient costs", loc="left", fontsize=10)
