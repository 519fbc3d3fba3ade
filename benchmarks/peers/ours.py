"""The worker of this project, and the workload and weights for all others.

python benchmarks/peers/ours.py --export DIR --set size=S   # work.json, policy/, critic/
python benchmarks/peers/ours.py --set size=S                # answers "go": protocol.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from protocol import Turns

from rlhf_jax import bench, feed
from rlhf_jax.config import Config
from rlhf_jax.experiment import load
from rlhf_jax.models.exporting import export
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.phases import init

BENCH = Path(__file__).parents[1]


def main() -> None:
    """Export, or serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A=VALUE")
    parser.add_argument("--export", type=Path, metavar="DIR")
    options = parser.parse_args()
    config = load(BENCH / "ppo.py", options.settings)
    if options.export is not None:
        prepare(config, options.export)
    else:
        serve(config)


def serve(config: Config) -> None:
    """Steps of the training loop itself, metrics and all."""
    turns = Turns(versions={name: version(name) for name in ("jax", "jaxlib")})
    rows = prompts(config).shape[0]
    with tempfile.TemporaryDirectory() as out:
        for step in bench.iterations(dataclasses.replace(config, steps=2**31), Path(out)):
            times = {k.removeprefix("time/"): x for k, x in step.items() if k.startswith("time/")}
            turns.done(
                rollout=times["rollout"],
                score=times["reward"] + times["score"],
                update=sum(x for name, x in times.items() if name.startswith("update/")),
                tokens=round(rows * step["rollout/length"]),
            )


def prepare(config: Config, out: Path) -> None:
    """Write the weights that the first step begins with, and what is to be done with them."""
    sys.path.append(str(BENCH))
    from ppo import FIRST

    learners = init(config.seed, config=config).learners
    for name in ("policy", "critic"):
        model = config.learners[name].model
        # A family knows transformers, whatever drew their first weights.
        fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(Transformer)}
        export(out / name, Transformer(**fields), learners[name].params)
    spec, policy = config.rollouts, config.learners["policy"]
    tokens, vocab = prompts(config), policy.model.vocab
    found = {
        "rows": tokens.shape[0],
        "prompt": tokens.shape[1],
        "length": spec.length,
        "vocab": vocab,
        "first": FIRST,  # of the tokens that prompts are made of
        "paid": [FIRST, FIRST + vocab // 4],  # a response earns its share of tokens in this range
        "stop": next(iter(spec.sampling.stop), None),
        "epochs": policy.epochs,
        "minibatches": policy.minibatches,
        "clip": policy.objective.keywords["clip"],
        "rate": policy.optimizer.keywords["learning_rate"],
        "kl": spec.kl.initial,
        "trace": spec.advantage.keywords["advantage"].keywords["trace"],
    }
    (out / "work.json").write_text(json.dumps(found, indent=1) + "\n")


def prompts(config: Config) -> np.ndarray:
    """Tokens of the first batch of prompts."""
    return np.asarray(next(iter(feed.opened(config, config.rollouts.prompts))).tokens)


if __name__ == "__main__":
    main()
