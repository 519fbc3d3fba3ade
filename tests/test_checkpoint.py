"""Checkpoints: what was saved is read back, on any mesh, after any crash, or an error says why."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding, stored
from rlhf_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Preemption,
    Stopped,
    restore_params,
)
from rlhf_jax.types import Control, LearnerState, TrainState

OPTIMIZER = optax.adam(1e-3)
SPLIT = {"w": P("fsdp", "tensor"), "b": P("tensor"), "half": P()}


def spec_of(path):
    return SPLIT.get(sharding.path_name(path).split("/")[-1], P())


def make_state(seed=0, width=16, name="policy"):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "layer": {
            "w": jax.random.normal(keys[0], (32, width)),
            "b": jnp.arange(width, dtype=jnp.float32),
        },
        "half": jax.random.normal(keys[1], (8,)).astype(jnp.bfloat16),
    }
    zero = jnp.zeros((), jnp.int32)
    learner = LearnerState(params, OPTIMIZER.init(params), zero, zero, zero)
    control = Control(jnp.float32(0.1), jnp.float32(0.0), jnp.float32(1.0))
    return TrainState(jnp.int32(seed), {name: learner, "key": jax.random.key(seed)}, control)


def on_mesh(tree, shape):
    """The abstract tree, split over a mesh of this shape."""
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.make_mesh(shape, devices)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(path))
        ),
        jax.eval_shape(lambda: tree),
    )


def place(tree, shape):
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, on_mesh(tree, shape))


def bits(tree):
    def one(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return [one(x) for x in jax.tree.leaves(tree)]


def stream(seed=0):
    return iter(grain.MapDataset.range(1000).seed(seed).shuffle().repeat().batch(4))


def data_files(step):
    """Files of a step, the largest first: that is where the arrays are."""
    files = [p for p in Path(step).rglob("*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


def test_a_step_restores_bit_for_bit_onto_every_mesh(tmp_path):
    state = place(make_state(), (2, 2, 2, 1))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(3, state)
    with Checkpoints(tmp_path) as checkpoints:
        for shape in ((2, 2, 2, 1), (8, 1, 1, 1), (1, 4, 2, 1), (1, 1, 1, 1)):
            target = on_mesh(state, shape)
            found = checkpoints.restore(3, target)
            assert bits(found) == bits(state)
            for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
                assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def test_data_streams_go_on_at_the_very_next_batch(tmp_path):
    state, text, prompts = make_state(), stream(1), stream(2)
    for _ in range(3):
        next(text)
    next(prompts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"text": text, "prompts": prompts})
        expected = [next(text), next(prompts)]  # after the call, so not what is saved
    again = {"text": stream(1), "prompts": stream(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(1, on_mesh(state, (1, 1, 1, 1)), again)
    for found, wanted in zip([next(again["text"]), next(again["prompts"])], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_step_that_kept_a_place_for_each_process_is_refused_and_its_weights_are_read(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"text": stream()})
    path = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in about.items() if k != "data"}))
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(CheckpointError, match=r"older version.*From\(path=RUN\)"),
    ):
        checkpoints.restore(1, on_mesh(state, (1, 1, 1, 1)), {"text": stream()})
    assert bits(restore_params(tmp_path, "policy")) == bits(state.learners["policy"].params)


def test_streams_that_stand_at_other_places_in_other_processes_are_not_saved(tmp_path, monkeypatch):
    def gather(mine):  # as if a second process had read one batch more
        return np.stack([mine, mine + 1])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="data 'text': processes differ"),
    ):
        checkpoints.save(1, make_state(), {"text": stream()})


def test_an_unknown_stream_is_named(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"text": stream()})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"no data stream 'prompts'.*\['text'\]"):
            checkpoints.restore(1, on_mesh(state, (1, 1, 1, 1)), {"prompts": stream()})


def test_the_state_may_be_donated_right_after_saving(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    start = {"w": jnp.zeros((512, 512)), "count": jnp.zeros((), jnp.int32)}
    state = place(start, (8, 1, 1, 1))
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for n in range(1, 5):
            state = step(state)
            checkpoints.save(n, state)
            state = step(step(state))
            state = jax.tree.map(lambda x: x - 2, state)
        checkpoints.wait()
        for n in range(1, 5):
            found = checkpoints.restore(n, on_mesh(start, (8, 1, 1, 1)))
            assert int(found["count"]) == n
            np.testing.assert_array_equal(np.asarray(found["w"]), n)


def test_only_the_last_steps_are_kept_and_frozen_weights_stay(tmp_path):
    state = make_state()
    frozen = {"reference": state.learners["policy"].params}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save_frozen({"reference": jax.tree.map(jnp.zeros_like, frozen["reference"])})
        checkpoints.save_frozen(frozen)  # a run killed before its first step starts again
        for step in (2, 4, 6):
            assert checkpoints.save(step, state, about={"seed": step})
        assert not checkpoints.save(6, state)  # the last step and SIGTERM may fall together
        checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        assert checkpoints.about(4) == {"seed": 4}
        found = checkpoints.restore_frozen(on_mesh(frozen, (2, 2, 2, 1)))
        assert bits(found) == bits(frozen)
        with pytest.raises(CheckpointError, match="already holds steps"):
            checkpoints.save_frozen(frozen)
        with pytest.raises(CheckpointError, match=r"already holds step 6.*after 4"):
            checkpoints.save(5, state)
        with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 5.*\[4, 6\]"):
            checkpoints.restore(5, state)


def test_missing_frozen_weights_are_an_error(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"frozen is missing.*reference"),
    ):
        checkpoints.restore_frozen({"reference": {}})


def test_a_state_that_does_not_fit_is_an_error_naming_the_paths(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
        checkpoints.wait()
        wide = on_mesh(make_state(width=32), (1, 1, 1, 1))
        with pytest.raises(
            CheckpointError, match=r"learners/policy/params/layer/w: float32\[32, 16\].*\[32, 32\]"
        ):
            checkpoints.restore(1, wide)
        other = on_mesh(make_state(name="critic"), (1, 1, 1, 1))
        with pytest.raises(CheckpointError, match=r"critic/.*in this run, not in the checkpoint"):
            checkpoints.restore(1, other)
        state = make_state()
        fewer = state.replace(learners={"policy": state.learners["policy"]})
        with pytest.raises(CheckpointError, match="learners/key: in the checkpoint, not in this"):
            checkpoints.restore(1, on_mesh(fewer, (1, 1, 1, 1)))
        half = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
        )
        with pytest.raises(CheckpointError, match=r"float32.* saved, bfloat16"):
            checkpoints.restore(1, on_mesh(half, (1, 1, 1, 1)))


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# Orbax's reader threads may complain about the event loop that the error has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_step_is_an_error_that_says_how_to_resume_from_an_earlier_one(tmp_path, damage):
    state, directory = make_state(width=512), tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    path = data_files(directory / "2")[0]
    path.write_bytes(damage(path.read_bytes()))
    target = on_mesh(state, (1, 1, 1, 1))
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(CheckpointError, match=r"step 2 .* cannot be read.*resume from step 1") as e,
    ):
        checkpoints.restore(checkpoints.latest(), target)
    with pytest.raises(CheckpointError, match="step 2"):
        restore_params(tmp_path, "policy")
    command = str(e.value).splitlines()[-1].split()
    assert command[0] == "mv"
    subprocess.run(command, check=True)  # what the message says works
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == 1
        assert bits(checkpoints.restore(1, target)) == bits(state)
        assert checkpoints.save(2, state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_no_file_of_a_step_can_be_cut_without_an_error_or_an_intact_state(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        target, caught = on_mesh(state, (1, 1, 1, 1)), 0
        for path in data_files(tmp_path / "1"):
            whole = path.read_bytes()
            path.write_bytes(cut(whole))
            try:
                assert bits(checkpoints.restore(1, target)) == bits(state), path
            except CheckpointError:
                caught += 1
            path.write_bytes(whole)
        assert caught >= 4


def test_one_learners_weights_are_read_without_the_rest(tmp_path):
    state = place(make_state(), (2, 2, 2, 1))
    params = state.learners["policy"].params
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state)
    found = restore_params(tmp_path, "policy")
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
    assert bits(found) == bits(params)
    target = on_mesh(params, (1, 4, 2, 1))
    placed = restore_params(tmp_path, "policy", step=7, target=target)
    assert bits(placed) == bits(params)
    assert placed["layer"]["w"].sharding == target["layer"]["w"].sharding
    full = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), target
    )
    upcast = restore_params(tmp_path, "policy", target=full)["half"]
    assert upcast.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(upcast), np.asarray(params["half"], np.float32))
    with pytest.raises(CheckpointError, match=r"learners/critic.*valid there: key, policy"):
        restore_params(tmp_path, "critic")
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        restore_params(tmp_path / "checkpoints", "policy")
    with pytest.raises(CheckpointError, match=r"step 9.*\[7\]"):
        restore_params(tmp_path, "policy", step=9)


def test_a_digest_is_the_same_on_every_mesh_and_sees_one_bit_and_every_swap():
    x = jnp.arange(64.0).reshape(8, 8)
    digest = stored.digests({"w": x})
    for shape in ((2, 2, 2, 1), (8, 1, 1, 1)):
        assert stored.digests(place({"w": x}, shape)) == digest
    seen = {digest["w"]}
    for other in (x.at[3, 3].set(27.000002), x.T, x[::-1], x.at[0, 0].set(-0.0), x * 0):
        seen.add(stored.digests({"w": other})["w"])
    assert len(seen) == 6


def test_an_unwritable_directory_is_an_error_before_any_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*choose another"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_link_that_breaks_during_a_save_is_called_that(tmp_path, monkeypatch):
    def save(*arguments, **named):
        try:
            raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
        except ValueError as error:
            raise RuntimeError("a barrier") from error

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", save)
        with pytest.raises(
            CheckpointError, match=r"link to another process broke, so .*/1 was not"
        ):
            checkpoints.save(1, make_state())


def test_a_full_disk_is_an_error_and_the_step_before_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        small = make_state()
        large = make_state(width=2**17)
        checkpoints = Checkpoints(disk / "checkpoints")
        checkpoints.save(1, small)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"/2 was not written: the disk is full"):
            checkpoints.save(2, large)
            checkpoints.wait()
        checkpoints.close()
        with Checkpoints(disk / "checkpoints") as checkpoints:
            assert checkpoints.latest() == 1
            found = checkpoints.restore(1, on_mesh(small, (1, 1, 1, 1)))
            assert bits(found) == bits(small)
            assert checkpoints.save(2, small)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Saves without end; each step's arrays all hold the step's number.
SAVER = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from rlhf_jax.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    noise = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    for step in range(1, 1000):
        state = {f"w{i}": jnp.asarray(noise + step) for i in range(6)}
        state["step"] = jnp.int32(step)
        checkpoints.save(step, state)
        print("begun", step, flush=True)
        if step == 1:
            checkpoints.wait()
            print("complete 1", flush=True)
"""


def start_saver(directory):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    saver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for line in saver.stdout:
        if line.startswith("complete"):
            return saver
    raise AssertionError("the saver ended before its first step")


def check_after_kill(directory, at_least):
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        assert step >= at_least
        target = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(6)}
        target["step"] = jax.ShapeDtypeStruct((), jnp.int32)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target
        )
        found = checkpoints.restore(step, target)
    noise = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    assert int(found["step"]) == step
    for i in range(6):
        np.testing.assert_array_equal(np.asarray(found[f"w{i}"]), noise + step)
    return step


def kill_trials(directory, trials):
    random, left_over = np.random.default_rng(trials), 0
    for trial in range(trials):
        where = directory / str(trial)
        with start_saver(where) as saver:
            time.sleep(random.uniform(0.05, 1.2))
            saver.send_signal(signal.SIGKILL)
            begun = [int(line.split()[1]) for line in saver.stdout if line.startswith("begun")]
        left_over += any("tmp" in p.name for p in where.iterdir())
        check_after_kill(where, at_least=max(begun, default=2) - 1)  # save waits for the one before
    return left_over


def test_kill_9_during_a_save_loses_nothing_before_it(tmp_path):
    kill_trials(tmp_path, 1)


@pytest.mark.slow
def test_kill_9_at_many_moments_loses_nothing_before_it(tmp_path):
    assert kill_trials(tmp_path, 8) > 0  # some really were in the middle of a save


def test_a_signal_asks_to_stop_and_the_old_handler_comes_back():
    def mine(number, frame):
        raise AssertionError("the handler of before was called")

    original = signal.signal(signal.SIGTERM, mine)
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(2)
            assert preemption.signal is signal.SIGTERM
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one kills
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, original)
    assert issubclass(Stopped, KeyboardInterrupt)


def test_a_second_signal_kills_at_once():
    code = """
        import time
        from rlhf_jax.preemption import Preemption
        with Preemption():
            print("ready", flush=True)
            time.sleep(60)
            time.sleep(60)
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with child:
        assert child.stdout.readline().strip() == "ready"
        child.send_signal(signal.SIGTERM)
        while "SIGTERM" not in child.stdout.readline():
            pass
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == -signal.SIGTERM


def test_with_several_processes_jax_says_when_all_stop():
    # One process is enough: the same service coordinates any number.
    code = """
        import os, signal, socket, time, jax
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        jax.config.update("jax_platforms", "cpu")
        jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
        from rlhf_jax.preemption import Preemption
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            for step in range(2, 400):
                if preemption.requested(step):
                    print("stopped", flush=True)
                    break
                time.sleep(0.05)
        jax.distributed.shutdown()
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == ["stopped"], done.stderr
    assert done.returncode == 0
