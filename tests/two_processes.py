"""One of two processes: `python two_processes.py TASK DIRECTORY`; prints JSON."""

import json
import re
import sys
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
from numpy.testing import assert_array_equal

from rlhf_jax import cli, inference, objectives, phases, processes, sharding, start
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Config, From, Learner
from rlhf_jax.models import pretrained, weights
from rlhf_jax.optimizer import sgd


def drawn(name, shape):
    """The weights of that path, the same in every process; the first is a nan of its own bits."""
    found = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    found.reshape(-1).view(np.uint32)[0] = 0x7FA1_2345
    return found


def peak():
    """GiB of memory that this process had at most; `getrusage` counts the parent's before exec."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def config(path):
    model = pretrained.model(path, scan=True)
    rate = partial(sgd, learning_rate=1.0)
    learner = Learner(
        model, objectives.mle, batch="text", optimizer=rate, start=From(path=str(path))
    )
    return Config("x", 1, {"policy": learner}, {"text": dict}, mesh=(1, 2, 1, 1))


def check(params):
    """Every shard is the part that it should be of what was drawn."""
    for name, x in weights.flat(params).items():
        for shard in x.addressable_shards:
            if not name.startswith("layers/"):
                assert_array_equal(np.asarray(shard.data), drawn(name, x.shape)[shard.index])
                continue
            for i, part in enumerate(np.asarray(shard.data)):
                one = drawn(re.sub("^layers/", f"layers_{i}/", name), x.shape[1:])
                assert_array_equal(part, one[shard.index[1:]])


def main(task, path):
    processes.start(path)
    mesh, given = sharding.make_mesh((1, 2, 1, 1)), config(path / "model")
    found = {"base": peak()}
    with jax.set_mesh(mesh):
        state, _ = start.begin(given, phases.build(given, mesh), {})
        params = jax.block_until_ready(state.learners["policy"].params)
        parts = [shard.data for x in jax.tree.leaves(params) for shard in x.addressable_shards]
        found |= {"peak": peak(), "arrays": sum(x.nbytes for x in parts) / 2**30}
        check(params)
        if task == "export":
            with Checkpoints(path / "run" / "checkpoints") as checkpoints:
                checkpoints.save(1, state)
    if task == "export":
        inference.export(given, path / "run", path / f"out{jax.process_index()}")
    print("\n" + json.dumps(found), flush=True)
    processes.finish()


if __name__ == "__main__":
    cli._quiet()
    main(sys.argv[1], Path(sys.argv[2]))
