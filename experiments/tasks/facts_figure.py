"""The figure of `token_feedback.py`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.study.bands import band
from rlhf_jax.study.results import Results

BLUE, LIGHT, GREEN = "#1f6fb4", "#7fb2dd", "#3a9a5b"
ORANGE, RED = "#dd7b26", "#c23b46"
PURPLE, GREY, BROWN = "#8b5fbf", "#777777", "#8c6d46"
BY_LABELS = {
    "horizon_one": ("marks on tokens, horizon 1", BLUE, "o"),
    "dpo": ("preferences, DPO and likelihood", ORANGE, "^"),
}


def drawn(results: Results, *, labels: tuple[int, ...], usual: int, enough: float) -> Figure:
    """Labels needed, what happens to a bad token, what else moves, and where marks do not help."""
    found = Figure(figsize=(12, 8.2), layout="constrained")
    (need, push), (moved, limits) = found.subplots(2, 2)
    _need(need, results, labels, enough)
    _push(push, results, usual)
    _moved(moved, results, usual)
    _limits(limits, results, usual)
    return found


def _has(results, arm):
    return arm in results.arms


def _need(axes, results, labels, enough):
    for i, (kind, (says, colour, marker)) in enumerate(BY_LABELS.items()):
        there = [n for n in labels if _has(results, f"{kind}_{n}")]
        if not there:
            continue
        wrong = np.array([results.values("wrong_known", f"{kind}_{n}") for n in there])
        aside = np.array(there) * 1.05 ** (i - 1)  # so that dots of two arms do not hide each other
        axes.plot(aside, wrong, marker, color=colour, markersize=3, alpha=0.4)
        axes.plot(aside, wrong.mean(axis=1), color=colour, marker=marker, label=says)
    axes.axhline(enough, color=GREY, linestyle=":", linewidth=1)
    axes.text(labels[0] / 1.28, enough, f"{enough:g}", color=GREY, va="bottom", fontsize=9)
    axes.set(
        xscale="log", yscale="log", xlabel="labels", ylabel="P(wrong country), marked facts",
        title="How many labels does it take?",
    )  # fmt: skip
    axes.set_xlim(labels[0] / 1.3, labels[-1] * 1.3)
    axes.set_xticks(labels, [str(n) for n in labels])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _push(axes, results, usual):
    arms = {
        "signed": ("signed likelihood", RED), "unlikelihood": ("unlikelihood", GREEN),
        "cringe": ("CRINGE", PURPLE), "npo": ("token NPO", BROWN),
        f"horizon_one_{usual}": ("horizon 1", BLUE), f"dpo_{usual}": ("preferences", ORANGE),
        "dpo_plain": ("DPO alone", GREY),
    }  # fmt: skip
    for arm, (says, colour) in arms.items():
        if _has(results, arm):
            band(axes, *results.curve("log_false", arm), color=colour, label=says)
    axes.set(
        xlabel="step", ylabel="log p(false country), marked facts",
        title="What becomes of a bad token?",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9)


def _moved(axes, results, usual):
    arms = {
        "signed": ("signed\nlikelihood", RED), "unlikelihood": ("unlike-\nlihood", GREEN),
        "cringe": ("CRINGE", PURPLE), "npo": ("token\nNPO", BROWN),
        f"horizon_one_{usual}": ("horizon 1", BLUE), f"dpo_{usual}": ("prefer-\nences", ORANGE),
        "dpo_plain": ("DPO\nalone", GREY),
    }  # fmt: skip
    arms = {arm: says for arm, says in arms.items() if _has(results, arm)}
    for i, (arm, (_, colour)) in enumerate(arms.items()):
        each = results.values("collateral", arm)
        axes.plot(np.full(each.shape, i), each, "o", color=colour, alpha=0.35, markersize=5)
        axes.plot([i - 0.25, i + 0.25], [each.mean()] * 2, color=colour, linewidth=3)
    axes.set(
        yscale="log", ylabel="KL to the base, nats per sentence", title="What else moves?"
    )  # fmt: skip
    axes.set_xticks(range(len(arms)), [says for says, _ in arms.values()])
    axes.margins(x=0.15)


def _limits(axes, results, usual):
    groups = (
        ("facts that nobody\nmarked", "wrong_other",
         (f"horizon_one_{usual}", "table_rl", "token_model_rl", f"dpo_{usual}")),
        ("marked facts", "wrong_known",
         (f"horizon_one_{usual}", "table_rl", "token_model_rl", f"dpo_{usual}")),
        ("decided two\nwords later", "wrong_known",
         ("late_horizon_one", "late_dpo", "late_moved")),
    )  # fmt: skip
    looks = {
        f"horizon_one_{usual}": ("marks, exact", BLUE),
        "late_horizon_one": ("marks, exact", BLUE),
        "table_rl": ("marks, sampled", LIGHT),
        "token_model_rl": ("reward model of tokens, sampled", PURPLE),
        f"dpo_{usual}": ("preferences", ORANGE),
        "late_dpo": ("preferences", ORANGE),
        "late_moved": ("marks on the word that decides", GREEN),
    }  # fmt: skip
    place, ticks = 0.0, []
    for says, metric, arms in groups:
        first = place
        for arm in (arm for arm in arms if _has(results, arm)):
            each, (label, colour) = results.values(metric, arm), looks[arm]
            fresh = label not in axes.get_legend_handles_labels()[1]
            axes.bar(place, each.mean(), 0.8, color=colour, alpha=0.6,
                     label=label if fresh else None)  # fmt: skip
            axes.plot(np.full(each.shape, place), each, ".", color="black", markersize=4)
            if 0 in results.steps(arm, metric):
                before = results.values(metric, arm, 0).mean()
                axes.plot([place - 0.4, place + 0.4], [before] * 2, color="black", linewidth=1)
            place += 1
        ticks.append(((first + place - 1) / 2, says))
        place += 0.8
    axes.set(ylabel="P(wrong)", title="Where do marks not reach?")
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    axes.set_xticks([x for x, _ in ticks], [says for _, says in ticks])
    axes.plot([], [], color="black", linewidth=1, label="before training")
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
