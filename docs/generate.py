"""Writes docs/objectives.md from the docstrings: `python docs/generate.py`.

What is printed of a function is its docstring and its signature, so that neither can be out of
date: the first line is the formula and its source; `Args:` says what a hyperparameter is and what
the source used; `Use:`, `Memory:` and `Example:` say the rest. A test compares the file with what
this would write, and runs every example.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from rlhf_jax import (
    acquisition,
    advantages,
    adversarial,
    aggregate,
    conditioning,
    environment,
    exact,
    labelling,
    masked,
    objectives,
    pool,
    ratios,
    returns_to_go,
    rewards,
    selection,
)
from rlhf_jax.models import attention, probe, untagged
from rlhf_jax.objectives import presets

TARGET = Path(__file__).parent / "objectives.md"

# Objectives by what one has: their order is that of the page.
SECTIONS: dict[str, str] = {
    "Likelihood": "mle",
    "Policy gradients": "reinforce ppo value sampled_kl reference_kl combine",
    "Token feedback": "unlikelihood signed_likelihood token_npo cringe horizon_one",
    "Scores of texts": "weighted_regression score_value quark gated",
    "Reward models": "reward_model token_reward_model",
    "Preferences without a reward model": "dpo ipo kto orpo",
    "Distillation and search": "distill visit_counts outcome",
    "Adversarial": "discriminator energy",
}

# What stands beside an objective in a config: functions that are passed as arguments.
BESIDE: dict[str, tuple[object, str]] = {
    "Advantages": (advantages, "`Rollouts(advantage=…)`"),
    "Aggregation": (aggregate, "`aggregate=…` of an objective"),
    "Ratios and estimates of KL": (ratios, "`log_ratio=…`, `estimator=…`"),
    "Rewards": (rewards, "`Rollouts(reward=…)`, `Rollouts(shaping=…)`"),
    "Adversarial rewards and batches": (adversarial, "`Rollouts(reward=…)`, `Derived(…)`"),
    "Conditioning": (conditioning, "`Learner(transform=…)`, `Rollouts(transform=…)`"),
    "Returns to go": (returns_to_go, "`Learner(transform=…)`, `Rollouts(environment=…)`"),
    "Environments": (
        environment,
        "`Rollouts(environment=…)`; [an example](environments.md)",
    ),
    "Attention": (attention, "`Transformer(attention=…)`: where gradients stop"),
    "Probes": (probe, "a learner's model: a read-out that moves nothing"),
    "Models that skip control tokens": (untagged, "`Frozen(model=…)`"),
    "Laboratory": (exact, "exact answers for small policies"),
    "Selection": (selection, "`Learner(transform=…)`, `Derived(…)`"),
    "Pools": (pool, "`Derived(…, pool=…)`"),
    "Labelling": (labelling, "`Derived(…)`"),
    "Acquisition": (acquisition, "which comparison, or which premise, to ask about"),
}

PRESETS = """\
A `Preset` is numbers: `partial(ppo, **presets.ZIEGLER_2019.ppo)`. A `Variant` is a method without
a critic: its objective goes to the learner, its advantage to the rollouts, beside what you set:

```python
Learner(model, presets.GRPO.objective)
Rollouts(
    reward=reward,
    length=64,
    samples=8,  # per prompt
    advantage=presets.GRPO.advantage,
    value=None,  # no critic
    kl=KL(0.0, adaptive=False),  # GRPO's KL is in its objective
)
```
"""

# Functions that other modules share, and nobody needs for an experiment.
INTERNAL = {"edges_of", "bin_of", "inserted", "boundaries", "alike", "check", "begin", "answer"}
INTERNAL |= {"World", "Answer", "Kept", "distribution"}

HEAD = """\
<!-- Written by `python docs/generate.py` from the docstrings: change those. -->

# Objectives

An objective is a pure function `(scores, batch, *, hyperparameters) -> Terms`; a learner of an
experiment names it, with its hyperparameters bound:

```python
Learner(model, partial(ppo, clip=0.2), epochs=4, minibatches=4)
```

Losses are per token, per text or per pair; the trainer weighs, sums and divides. How to add your
own: [tutorial.md](tutorial.md); what an environment is: [environments.md](environments.md). Check
yours with `rlhf_jax.testing.check_objective`, and against exact answers with `rlhf_jax.exact`.

The examples take this for granted:

```python
from functools import partial

from rlhf_jax.advantages import *
from rlhf_jax.aggregate import *  # over_tokens, over_sequences, …
from rlhf_jax.conditioning import *
from rlhf_jax.config import Derived, Learner, Pool, Rollouts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import *
from rlhf_jax.pool import by_quantile
from rlhf_jax.ratios import k1, k2, k3
from rlhf_jax.selection import *

model = Transformer(vocab=264)  # with value_head=True, and lm_head=False, for critics and rewards
```

**Memory.** Every objective sees log-probabilities, values and rewards `[b, t]`; logits exist for
`Learner.chunk` tokens at a time and are recomputed in the backward pass. What one costs beyond that
stands with it: other models whose scores it reads (a forward pass each, no gradient), or a
vocabulary function, evaluated in the same chunks (one more `[chunk, v]` in float32 per model).
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _contents()]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_objective(name) for name in names.split()]
    parts.append(_variants())
    parts.append("## Beside an objective\n")
    for title, (module, where) in BESIDE.items():
        parts.append(f"### {title}\n\nFor {where}; in `{module.__name__}`.\n")
        parts.append(_table(module))
    return "\n".join(parts)


def documented() -> set[str]:
    """Names that the page has a section of."""
    return {name for names in SECTIONS.values() for name in names.split()}


def examples() -> dict[str, str]:
    """The example of every objective, as code."""
    return {name: _sections(getattr(objectives, name))["Example"] for name in sorted(documented())}


def helpers(name: str) -> list[str]:
    """Functions that an objective needs beside itself: its vocabulary, its statistics."""
    module = inspect.getmodule(getattr(objectives, name))
    return [
        other
        for other in vars(objectives)
        if other != name
        and other not in documented()
        and inspect.isfunction(fn := getattr(objectives, other))
        and inspect.getmodule(fn) is module
    ]


def _contents() -> str:
    lines = ["| objective | what it is |", "|---|---|"]
    for names in SECTIONS.values():
        for name in names.split():
            lines.append(f"| [`{name}`](#{name}) | {_first(getattr(objectives, name))} |")
    return "\n".join(lines) + "\n"


def _variants() -> str:
    lines = ["## Published settings", "", "In `rlhf_jax.objectives.presets`:", ""]
    lines += ["| name | source |", "|---|---|"]
    for name, one in vars(presets).items():
        if hasattr(one, "source") and not inspect.isclass(one):
            lines.append(f"| `{name}` | {one.source} |")
    lines += ["", PRESETS]
    return "\n".join(lines) + "\n"


def _objective(name: str) -> str:
    fn = getattr(objectives, name)
    found = _sections(fn)
    lines = [f"### {name}", "", f"`{_signature(fn)}`", "", found[""], ""]
    lines += _arguments(fn, found.get("Args", ""))
    for part in ("Use", "Memory"):
        if part in found:
            text = " ".join(found[part].split())
            lines += [f"**{part}.** {text[0].upper()}{text[1:]}", ""]
    lines += ["```python", found["Example"], "```", ""]
    for other in helpers(name):
        fn = getattr(objectives, other)
        found = _sections(fn)
        lines += [f"#### {other}", "", f"`{_signature(fn)}`", "", found[""], ""]
        lines += _arguments(fn, found.get("Args", ""))
    return "\n".join(lines)


def _arguments(fn: Callable, told: str) -> list[str]:
    """A table of hyperparameters: name, default, what it is."""
    said = dict(re.findall(r"^(\w+): (.*(?:\n[ ]+.*)*)", told, re.M))
    given = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not given:
        return []
    lines = ["| hyperparameter | default | |", "|---|---|---|"]
    for one in given:
        text = " ".join(said.get(one.name, "").split())
        lines.append(f"| `{one.name}` | {_default(one)} | {text} |")
    return [*lines, ""]


def _table(module: object) -> str:
    """Public functions of a module, or of a package."""
    lines = ["| function | what it is |", "|---|---|"]
    for name, fn in vars(module).items():
        home = getattr(fn, "__module__", "") or ""
        own = home == module.__name__ or home.startswith(f"{module.__name__}.")
        public = not name.startswith("_") and name not in INTERNAL
        if own and public and (inspect.isfunction(fn) or inspect.isclass(fn)):
            lines.append(f"| `{name}` | {_first(fn)} |")
    return "\n".join(lines) + "\n"


def _signature(fn: Callable) -> str:
    names = []
    for one in inspect.signature(fn).parameters.values():
        if one.kind is one.VAR_KEYWORD:
            names.append(f"**{one.name}")
        elif one.kind is not one.KEYWORD_ONLY:
            names.append(one.name)
        elif one.default is one.empty:
            names.append(f"{one.name}=…")
        else:
            names.append(f"{one.name}={_plain(one.default)}")
    return f"{fn.__name__}({', '.join(names)})"


def _default(one: inspect.Parameter) -> str:
    return "required" if one.default is one.empty else f"`{_plain(one.default)}`"


def _plain(value: object) -> str:
    name = getattr(value, "__name__", None)
    if getattr(value, "__module__", "") == masked.__name__:
        return f"masked.{name}"  # sum is not Python's
    return name or repr(value)


def _first(fn: object) -> str:
    """The first paragraph, on one line of a table."""
    text = inspect.getdoc(fn).split("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


def _sections(fn: Callable) -> dict[str, str]:
    """A docstring by its headings; what stands before the first under ''."""
    found, name = {"": []}, ""
    for line in inspect.getdoc(fn).splitlines():
        if match := re.match(r"(Args|Use|Memory|Example|Raises|Returns):\s*(.*)", line):
            name = match[1]
            found[name] = [match[2]] if match[2] else []
        else:
            found[name].append(line)
    return {key: textwrap.dedent("\n".join(lines)).strip() for key, lines in found.items()}


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
