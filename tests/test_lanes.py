"""Programs at once on one CPU: who may, that they do, and that nothing else changes."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lanes, sharding
from rlhf_jax.config import Derived
from rlhf_jax.experiment import load
from rlhf_jax.objectives import value
from rlhf_jax.train import train, turns

SMOKE = Path(__file__).parent.parent / "experiments" / "smoke.py"


@pytest.fixture
def one():
    return sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(lanes, "count", lambda mesh: 2)


def test_only_one_cpu_has_lanes(one):
    assert lanes.count(one) >= 1
    assert lanes.count(sharding.make_mesh((2, 1, 1, 1), jax.devices()[:2])) == 1


def test_a_program_is_traced_once_under_the_mesh_and_its_errors_are_the_callers(one, two):
    seen = []

    @jax.jit
    def double(x):
        seen.append((jax.sharding.get_abstract_mesh(), threading.current_thread().name))
        return 2 * x

    found = [lanes.start(one, i, double, jnp.float32(i)) for i in range(5)]
    np.testing.assert_array_equal(found, [0, 2, 4, 6, 8])
    ((mesh, thread),) = seen
    assert mesh == one.abstract_mesh and thread.startswith("lane0")
    with pytest.raises(ZeroDivisionError):
        lanes.start(one, 0, lambda: 1 // 0)


def test_a_short_program_does_not_wait_for_a_long_one_of_another_lane(one, two):
    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 60_000, lambda i, x: jnp.sin(x + i), x)

    start = jnp.zeros(1000)
    jax.block_until_ready(long(start))  # compiled
    first = lanes.start(one, 0, long, start)
    jax.block_until_ready(lanes.start(one, 1, jnp.cos, start))
    assert not first.is_ready()
    behind = lanes.start(one, 2, long, start)  # lane 0 again
    jax.block_until_ready(behind)
    assert first.is_ready()


@pytest.mark.usefixtures("compiled_once")
def test_a_run_learns_the_same_bits_whether_its_programs_run_at_once(tmp_path, monkeypatch):
    config = replace(load(SMOKE), steps=2, mesh=(1, 1, 1, 1))
    config = replace(config, rollouts=replace(config.rollouts, chunks=2, show=0))
    found = []
    for many in (1, 2):
        monkeypatch.setattr(lanes, "count", lambda mesh, many=many: many)
        out = tmp_path / str(many)
        state = train(config, out, devices=jax.devices()[:1])
        found.append([np.asarray(x).tobytes() for x in jax.tree.leaves(state)])
        log = (out / "metrics.jsonl").read_text().splitlines()
        learnt = {name for name in json.loads(log[1]) if name.startswith("time/update/")}
        together = {"time/update/policy+critic"}
        assert learnt == (together if many == 2 else {"time/update/policy", "time/update/critic"})
    assert found[0] == found[1]


def test_learners_take_one_turn_unless_one_reads_what_another_learns(one, two, monkeypatch):
    config = load(SMOKE)
    names = ["policy", "critic"]
    learners = {name: config.learners["policy"] for name in names}
    given = replace(config, learners=learners)
    assert turns(given, names, one) == [names]
    assert turns(given, [], one) == []
    assert turns(given, ["critic"], one) == [["critic"]]

    def with_critic(**fields):
        return replace(given, learners=learners | {"critic": replace(learners["critic"], **fields)})

    reads = with_critic(scores=("policy", "reference"))
    assert turns(reads, names, one) == [["policy"], ["critic"]]
    assert turns(reads, ["critic"], one) == [["critic"]]
    made = {
        "pairs": Derived(make=value, of=("experience",), models=("policy",)),
        "best": Derived(make=value, of=("pairs",)),
    }
    derived = replace(with_critic(batch="best"), derived=made)
    assert turns(derived, names, one) == [["policy"], ["critic"]]
    monkeypatch.setattr(lanes, "count", lambda mesh: 1)
    assert turns(given, names, one) == [["policy"], ["critic"]]
