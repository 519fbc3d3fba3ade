"""Plans: bytes are those of live arrays, messages and operations those that pencils give."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import cli, cli_pods, flops, lanes, masked, objectives, sharding
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn, one_prompt
from rlhf_jax.experiment import load
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.phases import build
from rlhf_jax.plan import chips, collectives, compiled, meshes, page, phase
from rlhf_jax.plan.advice import advice
from rlhf_jax.plan.phase import cache_bytes, held, stored_bytes
from rlhf_jax.plan.programs import host_batches, programs
from rlhf_jax.plan.whole import plan
from rlhf_jax.start import begin

GIB = 2**30
SMOKE = str(Path(__file__).parent.parent / "experiments" / "smoke.py")
POD = str(Path(__file__).parent.parent / "experiments" / "models" / "pod.py")
UNREAD = ("logp", "behaviour_logp", "ended", "prompt_id", "sample_id", "earned", "steps",
          "ref_logp", "value", "reward", "target", "group_tokens")  # fmt: skip
CHIP = chips.Chip("toy", memory=1e6, flops=1e9, bandwidth=1e8, link=1e7, network=1e6)


@pytest.fixture
def cache_kept():
    """The command does without a compilation cache."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def paid(rollout, params):
    return masked.at_last(jnp.ones(rollout.ended.shape), rollout.mask)


@pytest.fixture(scope="module")
def config():
    """A policy and its reference, sixteen texts of three and four tokens."""
    model = Transformer(vocab=32, width=32, layers=1, heads=8, kv_heads=4, mlp=64, context=16)
    return Config(
        "toy",
        steps=1,
        learners={"policy": Learner(model, objectives.ppo, minibatches=2)},
        frozen={"reference": Frozen(From("policy"))},
        data={"prompts": partial(drawn, draw=partial(one_prompt, tokens=(1, 2, 3)), batch=16)},
        rollouts=Rollouts(paid, length=4, value=None, show=0),
        mesh=(2, 2, 2, 1),
    )


@pytest.fixture(scope="module")
def target():
    return replace(chips.target("cpu:8"), chip=CHIP, host=4)


@pytest.fixture(scope="module")
def found(config, target, compiled_once):
    """The plan of a chip that holds what stays, but not every phase."""
    return plan(config, replace(target, chip=replace(CHIP, memory=5.0e4)))


def on_one_device(tree):
    """Bytes of live arrays on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == first
    )


def test_bytes_of_a_plan_are_those_of_live_arrays(config, target, found):
    mesh = sharding.make_mesh(config.mesh, target.devices)
    with jax.set_mesh(mesh):
        phases = build(config, mesh)
    run = programs(config, phases, host_batches(config))
    with jax.set_mesh(mesh):
        state, frozen = begin(config, phases, {})
    learner = state.learners["policy"]
    assert held(run) == {
        "policy: weights": on_one_device(learner.params),
        "policy: optimiser": on_one_device(learner.opt_state),
        "reference: frozen weights": on_one_device(frozen),
    }
    update = next(one for one in run.programs if one.name == "update/policy")
    memory = found["phases"][-1]["memory"]
    batch = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), update.arguments[2]
    )
    key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))
    read = batch.replace(**dict.fromkeys(UNREAD, ()))
    before = on_one_device((learner, batch, jax.random.key_data(key)))
    with jax.set_mesh(mesh):
        after = phases.update["policy"](learner, {}, batch, key)
    table = 8 * len(jax.tree.leaves(after))  # where each result lies, which XLA:CPU counts, too
    assert memory["outputs"] == on_one_device(after) + table
    assert memory["arguments"] == before - on_one_device(batch) + on_one_device(read)
    assert memory["peak"] >= memory["arguments"] + memory["temporaries"]
    # While it runs there is also the reference, what the update leaves unread, and nothing twice.
    idle = on_one_device((frozen, state.step, state.control))
    assert memory["total"] == memory["peak"] + idle + on_one_device(batch) - on_one_device(read)


def test_programs_that_run_at_once_on_one_cpu_need_their_memory_at_once(
    config, target, monkeypatch, compiled_once
):
    policy = config.learners["policy"]
    critic = replace(policy, model=replace(policy.model, layers=2))
    one = replace(
        config,
        mesh=(1, 1, 1, 1),
        learners={"policy": policy, "critic": critic},
        rollouts=replace(config.rollouts, chunks=4),
    )
    cpu = replace(target, devices=target.devices[:1])

    def added(config):
        """Bytes that each phase makes, and what two lanes add to its total."""
        phases = []
        for many in (1, 2):
            monkeypatch.setattr(lanes, "count", lambda mesh, many=many: many)
            phases.append({row["name"]: row["memory"] for row in plan(config, cpu)["phases"]})
        alone, beside = phases
        new = {name: x["peak"] - x["arguments"] for name, x in alone.items()}
        return new, {name: beside[name]["total"] - x["total"] for name, x in alone.items()}

    new, more = added(one)
    for name in ("rollout", "score"):
        assert more[name] == new[name] > 0
    assert more["reward"] == 2 * new["rollout"]  # paid for one while two are sampled
    assert more["update/policy"] == new["update/critic"] > new["update/policy"]
    assert more["update/critic"] == new["update/policy"]
    assert more["collect"] == 0
    # What is sampled ahead may last as long as the step.
    new, more = added(replace(one, rollouts=replace(one.rollouts, chunks=1, ahead=True)))
    assert more["rollout"] == 0 < more["reward"] == more["score"] == new["rollout"]
    assert more["update/policy"] == new["update/critic"] + new["rollout"]


def test_a_plan_counts_each_chunk(config, target, found, compiled_once):
    """Half of the rows twice: the same operations, and twice the messages of all weights."""
    halves = plan(replace(config, rollouts=replace(config.rollouts, chunks=2)), target)
    whole, cut = ({row["name"]: row for row in one["phases"]} for one in (found, halves))
    for name in ("rollout", "reward", "score", "update/policy"):
        assert cut[name]["flops"] == pytest.approx(whole[name]["flops"])
        assert cut[name]["useful_flops"] == whole[name]["useful_flops"]
    gathered = [
        sum(x["moved"] for x in one["score"]["collectives"] if tuple(x["axes"]) == ("fsdp",))
        for one in (whole, cut)
    ]
    assert 0 < 1.9 * gathered[0] < gathered[1] < 2.1 * gathered[0]


def test_a_plan_counts_every_phase_and_says_what_does_not_fit(found, capsys):
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["copy/policy", "rollout", "reward", "score", "collect", "update/policy"]
    assert not found["fits"] and found["advice"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    rollout = found["phases"][1]
    assert set(rollout["parts"]) == {"prefill", "decode"}
    # Three of four tokens are decoded; what crosses tensor does so in every one of these steps.
    inside = [one for one in rollout["collectives"] if one["bounded"]]
    assert inside and all(one["count"] % 3 == 0 for one in inside)
    best, worst = found["seconds"]
    assert best <= worst
    assert found["speed"]["tokens_per_second"][0] == pytest.approx(16 * 4 / best)
    assert json.loads(json.dumps(found))["fits"] is False
    page.show(found)
    said = capsys.readouterr().out
    assert "does not fit" in said and "GiB less" in said


def test_keys_and_values_are_divided_as_the_rollout_divides_them(config):
    # A key and a value of four numbers for each token and each of four heads.
    each, mesh = 8 * 7 * 2 * 4 * 4 * 4, {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert cache_bytes(config, mesh, (8, 7)) == each / 4
    half = replace(config, rollouts=replace(config.rollouts, slots=4))
    assert cache_bytes(half, mesh, (8, 7)) == each / 8
    assert cache_bytes(config, {**mesh, "tensor": 2}, (8, 7)) == each / 8
    # Prompts of three and responses of two and of four: slots are of both sizes, all texts of one.
    windows = replace(config, rollouts=replace(config.rollouts, windows=2))
    assert cache_bytes(windows, mesh, (8, 7)) == each / 4
    windows = replace(half, rollouts=replace(half.rollouts, windows=2))
    assert cache_bytes(windows, mesh, (8, 7)) == each / 8 * (1 + 5 / 7)


HAND = """
HloModule hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carried: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carried = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4,8]{1,0} get-tuple-element(%carried), index=1
  %gathered = f32[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %y = f32[4,8]{1,0} slice(%gathered), slice={[0:4], [0:8]}
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
}

%more (carried.1: (s32[], f32[4,8])) -> pred[] {
  %carried.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

%again (given: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %given = (s32[], f32[4,8]{1,0}) parameter(0)
  %z = f32[4,8]{1,0} get-tuple-element(%given), index=1
  %moved = f32[4,8]{1,0} collective-permute(%z), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %n = s32[] get-tuple-element(%given), index=0
  ROOT %both = (s32[], f32[4,8]{1,0}) tuple(%n, %moved)
}

%unsure (given.1: (s32[], f32[4,8])) -> pred[] {
  %given.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%given.1), index=0
  %zero = s32[] constant(0)
  ROOT %is = pred[] compare(%m, %zero), direction=NE
}

%round (outer: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %outer = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %inner = (s32[], f32[4,8]{1,0}) while(%outer), condition=%unsure, body=%again
}

%still (outer.1: (s32[], f32[4,8])) -> pred[] {
  %outer.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%outer.1), index=0
  %none = s32[] constant(0)
  ROOT %differs = pred[] compare(%k, %none), direction=NE
}

ENTRY %main (p: f32[4,8]) -> f32[] {
  %p = f32[4,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %first = (s32[], f32[4,8]{1,0}) tuple(%start, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%first), condition=%more, body=%body
  %open = (s32[], f32[4,8]{1,0}) while(%loop), condition=%still, body=%round
  %q = bf16[16]{0} constant({...})
  %all = bf16[16]{0} all-reduce(%q), channel_id=2, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%add
  %part = bf16[2]{0} reduce-scatter(%q), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %r = f32[] constant(0)
}
"""  # noqa: E501


def test_messages_of_a_program_written_by_hand():
    mesh = sharding.make_mesh((2, 2, 2, 1))
    program = compiled.parse(HAND)
    assert program.trips == {"body": 5, "again": None, "round": None}  # 0, 2, 4, 6, 8
    found = {(one.kind, one.axes): one for one in collectives.collectives(program, mesh)}
    gather = found["all-gather", ("fsdp",)]
    assert (gather.count, gather.bytes, gather.moved) == (5, 5 * 8 * 8 * 4, 5 * 4 * 8 * 4)
    # Devices in the order 0 2 4 6 1 3 5 7, in rows of two: a column has 0 4 1 5.
    reduce = found["all-reduce", ("data", "tensor")]
    assert (reduce.count, reduce.bytes, reduce.moved) == (1, 32, 2 * 32 * 3 / 4)
    scatter = found["reduce-scatter", ("data", "fsdp", "tensor")]
    assert (scatter.count, scatter.bytes, scatter.moved) == (1, 32, 28)
    permute = found["collective-permute", ("tensor",)]
    assert (permute.count, permute.bytes, permute.unknown) == (1, 128, True)
    found = collectives.collectives(program, mesh, at_most=7)
    permute = next(one for one in found if one.kind == "collective-permute")
    assert (permute.count, permute.bytes, permute.bounded) == (7, 7 * 128, True)
    assert not permute.unknown


def test_a_scan_sends_its_messages_once_a_layer():
    """Weights [l, n, n] over fsdp and tensor: gathered forward and backward; a sum over data."""
    layers, n, mesh = 3, 32, sharding.make_mesh((2, 2, 2, 1))

    def loss(w, x):
        def layer(x, w):
            return sharding.split_rows(jnp.tanh(x @ w)), None

        return jax.lax.scan(layer, x, w)[0].sum()

    with jax.set_mesh(mesh):
        w = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        x = jax.ShapeDtypeStruct((16, n), jnp.float32, sharding=sharding.rows(mesh))
        given = jax.ShapeDtypeStruct((layers, n, n), jnp.float32, sharding=w)
        made = jax.jit(jax.grad(loss), out_shardings=w).lower(given, x).compile()
    program = compiled.parse(made.as_text())
    found = {(o.kind, o.axes): o for o in collectives.collectives(program, mesh)}
    gathered = found["all-gather", ("fsdp",)]
    assert (gathered.count, gathered.bytes) == (2 * layers, 2 * layers * n * n // 2 * 4)
    assert found["all-reduce", ("data",)].bytes == layers * n * n // 4 * 4
    assert not any(one.unknown or one.bounded for one in found.values())


def test_operations_of_a_program_are_those_of_its_shapes_and_of_xla(model):
    rows, tokens = 2, 64
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    text = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)

    def forward(params, tokens):
        return model.logits(params, model.apply(params, tokens).hidden)

    traced = jax.jit(forward).trace(shapes, text)
    counted = flops.of_program(traced.jaxpr)
    useful = flops.forward(model, rows=rows, tokens=tokens, read=tokens)
    # Attention is computed for all pairs, needed for those in the past; cosines are a product here.
    pairs = 4 * model.width * model.layers * rows
    useful += pairs * (tokens**2 - tokens * (tokens + 1) / 2)
    assert counted == pytest.approx(useful, rel=0.02)
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert counted < xla < 1.5 * counted  # what is not a product counts there, too


def test_loops_count_as_often_as_they_run():
    x = jnp.zeros((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    def open_ended(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

    assert flops.of_program(jax.make_jaxpr(scanned)(x)) == 5 * 2 * 4**3
    assert flops.of_program(jax.make_jaxpr(open_ended)(x), at_most=7) == 7 * 2 * 4**3

    def in_rounds(x):  # the inner loop runs so often in all
        return jax.lax.while_loop(lambda x: x.sum() > 0, open_ended, scanned(x))

    assert flops.of_program(jax.make_jaxpr(in_rounds)(x), at_most=7) == (5 + 7) * 2 * 4**3


def test_advice_names_the_amounts(config):
    model = replace(config.learners["policy"].model, layers=4)
    config = replace(config, learners={"policy": Learner(model, objectives.ppo)})
    resident = {"policy: weights": 4.0, "policy: optimiser": 8.0, "reference: frozen weights": 4.0}
    memory = {"peak": 20.0, "arguments": 8.0, "total": 30.0}
    found = {
        "chip": {"memory": 16.0}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1},
        "resident": resident, "cache": 8.0,
        "phases": [{"name": "update/policy", "memory": memory},
                   {"name": "rollout", "memory": {**memory, "total": 17.0}},
                   {"name": "score", "memory": {**memory, "total": 16.0}}],
    }  # fmt: skip
    said = {
        (one["phase"], one["change"].split(":")[0]): one["saves"] for one in advice(config, found)
    }
    assert said["update/policy", "--mesh with data=1, fsdp=4"] == 8
    assert said["update/policy", "--set learners.policy.model.remat=full"] == 9
    assert said["update/policy", "--set learners.policy.microbatches=2"] == 6
    assert said["rollout", "--set rollouts.slots=8"] == 4
    large = {**found, "phases": [{"name": "score", "memory": {**memory, "total": 17.0}}]}
    for chunks, half in ((1, True), (16, False)):  # a chunk of one row has no half
        cut = replace(config, rollouts=replace(config.rollouts, chunks=chunks))
        changes = [one["change"] for one in advice(cut, large)]
        assert any("rollouts.microbatches=2" in change for change in changes) is half
    assert not any(phase == "score" for phase, _ in said)


@pytest.mark.parametrize(("needs", "active"), [(38.0, 30.0), (None, 8.0), (15.9, 7.9)])
def test_of_a_phase_that_the_compiler_refuses_only_what_is_not_an_argument_comes_and_goes(
    config, needs, active
):
    """Without a number it needs more than the chip has, which is what savings are counted from.

    With one it may need less: libtpu keeps a quarter of a GiB of 16 for itself.
    """
    refused = {"refused": {"needs": needs, "said": "Ran out of it"}, "arguments": 8.0}
    found = {
        "chip": {"memory": 16.0}, "mesh": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 1},
        "resident": {}, "cache": 8.0, "fits": False, "seconds": None, "left_out": [],
        "phases": [{"name": name, **refused} for name in ("reward", "copy/policy", "rollout")],
    }  # fmt: skip
    found["advice"] = advice(config, found)
    said = {(one["phase"], one["change"].split(":")[0]): one["saves"] for one in found["advice"]}
    assert said["reward", "--set rollouts.chunks=2"] == int(active / 2)
    copy = stored_bytes(config.models["policy"], found["mesh"])
    for name in ("copy/policy", "rollout"):
        assert said[name, "--mesh with tensor=4, fsdp=1"] == copy // 2
    lines = page.verdict(found)
    assert ("  the compiler: Ran out of it" in lines) == (needs != 38.0)
    assert any(line.startswith("  at least ") for line in lines) == (needs is None)


@pytest.mark.parametrize("again", [-signal.SIGSEGV, 0])
def test_a_compiler_that_crashes_is_asked_once_more_and_ends_a_plan_with_words(
    monkeypatch, capsys, again
):
    """libtpu does on a program that is far too large, and now and then beside another of its."""
    asked, codes = [], [-signal.SIGSEGV, again]

    def crash(command, env):
        asked.append((command, env[cli_pods.PLANS]))
        return subprocess.CompletedProcess(command, codes[len(asked) - 1])

    monkeypatch.setattr(cli_pods.subprocess, "run", crash)
    arguments = ["plan", POD, "--set", "size=8B", "--topology", "v5e:2x4"]
    assert cli.main(arguments) == (1 if again else 0)
    said = capsys.readouterr().err
    assert "the compiler for v5e:2x4 crashed (SIGSEGV); once more, one program at a time" in said
    assert ("far too large" in said) == bool(again)
    command = [sys.executable, "-m", "rlhf_jax", *arguments]
    assert asked == [(command, "many"), (command, "one")]


def test_a_plan_that_is_terminated_leaves_no_compiler_behind(tmp_path):
    fake, pid = tmp_path / "python", tmp_path / "pid"
    fake.write_text(f"#!/bin/sh\necho $$ >{pid}.part && mv {pid}.part {pid}\nexec sleep 100\n")
    fake.chmod(0o755)
    code = f"import sys; from rlhf_jax import cli; sys.executable = {str(fake)!r}; "
    code += f"sys.exit(cli.main(['plan', {POD!r}, '--topology', 'v5e:2x4']))"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        for _ in range(600):
            if pid.exists():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_is_too_large_between_phases_is_not_compiled(config, target):
    small = replace(target, chip=replace(CHIP, memory=1e4))
    found = plan(config, small)
    (row,) = found["phases"]
    stays = sum(found["resident"].values())
    assert row["name"] == "between phases" and row["refused"]["needs"] == stays > 1e4
    assert not found["fits"] and found["seconds"] is None
    assert any("fsdp" in one["change"] for one in found["advice"])
    assert any(line.startswith("between phases does not fit") for line in page.verdict(found))
    page.show(found)


def test_what_a_compiler_says_it_would_need_is_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (16.83G) exceeds available HBM (15.75G)."
    assert phase.refusal(said)["needs"] == pytest.approx(16.83 * GIB)
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.5G of 15.75G hbm."
    assert phase.refusal(said)["needs"] == pytest.approx(20.5 * GIB)
    assert phase.refusal("RESOURCE_EXHAUSTED: no")["needs"] is None


def test_what_is_advised_can_be_pasted():
    """Every change of a number is a --set that the experiment takes."""
    resident = {"policy: optimiser": 8.0, "critic: weights": 4.0}
    memory = {"peak": 20.0, "arguments": 8.0, "total": 30.0}
    names = ("rollout", "score", "reward", "update/policy", "update/critic")
    found = {
        "chip": {"memory": 16.0}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1},
        "resident": resident, "cache": 8.0,
        "phases": [{"name": name, "memory": memory} for name in names],
    }  # fmt: skip
    smoke = load(SMOKE)
    given = {x["change"].split(":")[0] for x in advice(smoke, found)}
    given = sorted(x.removeprefix("--set ") for x in given if x.startswith("--set "))
    assert len(given) >= 7
    for setting in given:
        check(load(SMOKE, [setting]), devices=1)


def test_what_meshes_cost_is_what_the_formulas_say(config):
    """One layer, by hand: query and out 32², key and value 32 · 16, gate, up and down 32 · 64.

    The embedding of 32 · 32 is the head, too.
    """
    size = {"experience": (16, 7)}
    matrices = 2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 64
    norms = 3 * 32
    unread = (32**2 + 3 * 32 * 64) * 3  # what follows attention, for prompts
    forward = 16 * (2 * (matrices * 7 - unread) + 4 * 32 * 7 * 8 / 2 + 2 * 32 * 32 * 4)
    update = 16 * (2 * matrices * 7 + 4 * 32 * 7 * 8 / 2 + 2 * 32 * 32 * 7)
    compute = (3 * forward + 3 * update) / 8 / 1e9  # written, scored twice, learned from

    def at(**sizes):
        mesh = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, **sizes}
        return meshes.estimate(config, mesh, size, CHIP)

    weights = 4 * (matrices + norms + 32**2)
    got, links = at(data=8)
    assert got == pytest.approx(compute)
    # Two optimiser steps, a sum of gradients over eight.
    assert links == pytest.approx(2 * 2 * weights * 7 / 8 / 2e7)
    got, links = at(fsdp=8)
    # A rollout, two scores, and two steps forward, backward and of gradients.
    assert links == pytest.approx((1 + 2 + 2 * 3) * weights * 7 / 8 / 2e7)
    # Tensor halves the matrices, and adds up 28 tokens of a device twice in each of five passes.
    got, links = at(data=4, tensor=2)
    halved = 4 * ((matrices + 32**2) / 2 + norms)
    summed = 5 * 4 * 28 * 32 * 4 / 2
    assert links == pytest.approx((2 * 2 * halved * 3 / 4 + summed) / 2e7)
    assert at(data=4, tensor=2)[1] < at(data=8)[1] < at(fsdp=8)[1]


def test_search_refuses_with_reasons_and_ranks_the_rest(config, target):
    judged = list(meshes.candidates(config, target))
    assert len(judged) == math.comb(3 + 3, 3)  # 2³ over four axes
    at = {tuple(one.mesh.values()): one for one in judged}
    assert "heads" in at[1, 1, 8, 1].refused  # four heads of keys and values
    ranked = sorted(judged, key=lambda one: one.seconds)
    assert ranked[0].mesh == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}  # as by hand
    small = replace(target, chip=replace(CHIP, memory=at[4, 2, 1, 1].bytes - 1))
    at = {tuple(one.mesh.values()): one for one in meshes.candidates(config, small)}
    assert "does not fit" in at[4, 2, 1, 1].refused
    assert at[1, 2, 4, 1].refused is None


def test_search_compiles_the_best_by_arithmetic_and_puts_the_fastest_that_fits_first(
    config, target, monkeypatch
):
    asked = []

    def planned(config, target, *, mesh, say):
        """The first does not fit, the others are faster one after another."""
        asked.append(mesh)
        return {"fits": len(asked) > 1, "seconds": [9.0 - len(asked)] * 2, "mesh": mesh}

    monkeypatch.setattr(meshes, "plan", planned)
    found = meshes.search(config, target, best=3, say=lambda line: None)
    seconds = [one["seconds"] for one in found["judged"] if one["refused"] is None]
    assert seconds == sorted(seconds) and len(seconds) > 3
    assert asked == [tuple(one["mesh"].values()) for one in found["judged"][:3]]
    assert asked[0] == (4, 1, 2, 1)  # as by hand
    assert [one["mesh"] for one in found["plans"]] == [asked[2], asked[1], asked[0]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9:2x2"], "v5e:16x16"),
        (["--topology", "v5e:3x3"], "valid shapes of v5e"),
        (["--topology", "h200:8"], "slices × hosts × GPUs"),
        (["--topology", "cpu:many"], "cpu:8"),
        (["--topology", "cpu:64"], "xla_force_host_platform_device_count=64"),
        (["--topology", "cpu:8", "--mesh", "fsdp=8,heads=1"], "'heads' is no axis"),
        (["--topology", "cpu:8", "--mesh", "8"], "these are 1 sizes. Name axes"),
        (["--topology", "cpu:8", "--mesh", "data=x"], "data is x, not a number from 1"),
        (["--topology", "cpu:8", "--mesh", "data=8,1"], "'1' is no axis"),
        (["--topology", "cpu:8", "--mesh", "fsdp=2,fsdp=4"], "fsdp stands there twice"),
        (["--topology", "cpu:8", "--mesh", "fsdp=8", "--search"], "leave --mesh out"),
        (["--topology", "cpu:8", "--search", "--best", "0"], "--best 0: must be at least 1"),
        (["--topology", "v5p-256"], "their shape is needed, v5p:4x4x8"),
        (["--topology", "cpu:8", "--mesh", "fsdp=3"], "8 devices"),
        (["--topology", "cpu:8", "--set", "size=9B"], "8B"),
        (["--topology", "cpu:8", "--search"], "no limits of CPU"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_is_valid(
    arguments, says, capsys, cache_kept, monkeypatch
):
    monkeypatch.setenv(cli_pods.PLANS, "one")  # here, not in a process of its own
    size = [] if "--set" in arguments else ["--set", "size=tiny"]
    assert cli.main(["plan", POD, *size, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "extra"), [("v5e:2x2", "plan-tpu"), ("h100:1x1x8", "plan-gpu")]
)
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(topology, extra, monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=extra):
        chips.target(topology)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="pip install 'rlhf-jax[plan-tpu]'")
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x2", 4), ("tpu7x:2x2x1", 8)])
def test_a_tpu_that_is_not_there_is_planned_for(config, topology, devices):
    target = chips.target(topology)
    assert len(target.devices) == devices
    found = plan(replace(config, mesh=(1, -1, 2, 1)), target)
    assert found["fits"] and found["seconds"] is not None
    assert {axis for p in found["phases"] for c in p["collectives"] for axis in c["axes"]} == {
        "fsdp", "tensor"
    }  # fmt: skip
    assert not any(c["unknown"] for p in found["phases"] for c in p["collectives"])
