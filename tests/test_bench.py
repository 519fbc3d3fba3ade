"""What `bench` makes of times: operations and bytes that a phase needs, against the machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import toys

from rlhf_jax import bench, flops
from rlhf_jax.config import ConfigError
from rlhf_jax.data.drawn import drawn
from rlhf_jax.experiment import load
from rlhf_jax.rewards import KL

PPO = Path(__file__).parent.parent / "benchmarks" / "ppo.py"
PHASES = ("rollout", "reward", "score", "update/policy", "update/critic")
LIMIT = {"flops_per_second": 1e11, "bytes_per_second": 1e10}


def times():
    """Iterations of 1, 2 and 6 seconds, of which each phase takes a tenth."""
    found = [{"seconds": s, "rollout/length": 64.0} for s in (2.0, 1.0, 6.0)]
    return [x | {f"time/{name}": x["seconds"] / 10 for name in PHASES} for x in found]


def test_a_phase_is_held_against_its_operations_and_its_bytes():
    config = load(PPO, ["rows=8", "prompt=32", "length=64", "epochs=3", "minibatches=2"])
    found = bench.by_phase(config, times(), LIMIT)
    assert [found["rollout"][k] for k in ("seconds", "least", "most")] == [0.2, 0.1, 0.6]

    # Size S by hand: per layer query and out 192², key and value 192 · 64, gate, up and down
    # 192 · 512; two norms; one embedding, which is the head too.
    layer = 2 * 192**2 + 2 * 192 * 64 + 3 * 192 * 512
    policy = 6 * (layer + 2 * 192) + 192 + 4096 * 192
    pairs = 4 * 192 * 6 * 96 * 97 / 2
    matrices = 6 * layer * 96 - (192**2 + 3 * 192 * 512) * 32  # of the last layer for prompts
    forward = 8 * (2 * matrices + pairs + 2 * 192 * 4096 * 64)
    critic = 8 * (2 * matrices + pairs)
    assert found["rollout"]["flops"] == forward
    assert found["score"]["flops"] == forward + critic  # the sampler's log-probabilities are kept
    assert found["update/policy"]["flops"] == 3 * 3 * forward
    assert found["iteration"]["flops"] == pytest.approx((1 + 1 + 9) * forward + 10 * critic)

    cache = 2 * 6 * 64 * 4 * 8 * (96 - 32)  # half of the response, of keys and values
    assert found["rollout"]["bytes"] == 64 * (4 * policy + cache)
    assert found["update/policy"]["bytes"] == 3 * 2 * 11 * 4 * policy
    assert found["update/policy"]["of_bytes"] == pytest.approx(66 * 4 * policy / 0.2 / 1e10)
    assert found["rollout"]["of_flops"] == pytest.approx(forward / 0.2 / 1e11)
    assert "flops" not in found["reward"]


def test_scoring_again_counts_the_policy_and_every_micro_batch_its_weights():
    config = load(PPO, ["rows=8", "rescore=true", "microbatches=4"])
    found = bench.by_phase(config, times(), LIMIT)["score"]
    model, critic = (config.learners[name].model for name in ("policy", "critic"))
    assert found["bytes"] == 4 * (2 * flops.weight_bytes(model) + flops.weight_bytes(critic))
    operations = flops.forward(model, rows=8, tokens=96, read=64)
    assert found["flops"] == 2 * operations + flops.forward(critic, rows=8, tokens=96, read=64)


def test_learners_that_were_updated_at_once_are_one_phase():
    config = load(PPO, ["rows=8", "chunks=2", "microbatches=4"])
    alone = bench.by_phase(config, times(), LIMIT)
    found = [
        {k: x for k, x in one.items() if not k.startswith("time/update")} | {name: one["seconds"]}
        for one, name in zip(
            times(),
            ("time/update/policy+critic", "time/update/policy+critic", "time/update/sft+policy"),
            strict=True,
        )
    ]
    both = bench.by_phase(config, found, LIMIT)
    at_once = both["update/policy+critic"]
    assert at_once["seconds"] == 1.5
    for key in ("flops", "bytes", "tokens"):
        assert at_once[key] == alone["update/policy"][key] + alone["update/critic"][key]
        assert both["iteration"][key] == alone["iteration"][key]
    assert "flops" not in both["update/sft+policy"]  # nobody knows what sft reads
    reads = sum(flops.weight_bytes(config.models[name]) for name in ("reference", "critic"))
    assert both["score"]["bytes"] == 2 * 4 * reads  # of each chunk's micro-batches


def test_a_model_that_says_nothing_of_its_sizes_is_timed():
    config = load(PPO, ["rows=32", "prompt=4", "length=4"])
    draw = config.data["prompts"].keywords["draw"].func
    prompts = partial(drawn, draw=partial(draw, length=4, vocab=32), batch=32)
    policy = replace(config.learners["policy"], model=toys.Table(32))
    spec = replace(config.rollouts, reference=None, value=None, kl=KL(initial=0.0))
    own = {"data": {"prompts": prompts}, "learners": {"policy": policy}, "frozen": {}}
    found = bench.bench(replace(config, rollouts=spec, **own), repeats=1)
    assert found["phases"]["rollout"]["seconds"] > 0 == found["phases"]["rollout"]["flops"]
    assert found["limits"]["product"].endswith("float32")


def test_what_cannot_be_measured_is_refused_before_anything_is_compiled():
    config = load(PPO, ["rows=8"])
    for wrong, says in ((replace(config, rollouts=None), "rollouts"), (config, "at least 1")):
        with pytest.raises(ConfigError, match=says):
            bench.bench(wrong, repeats=0)
