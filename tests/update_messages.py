"""The compiled update of a small policy on a mesh, and what its devices send each other.

As a program, with a mesh and True or False for scanned layers, it compiles for eight H200s that
need not be there, and prints the messages as JSON.
"""

import json
import re
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from rlhf_jax import objectives, phases, sharding
from rlhf_jax.config import Config, Learner
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.types import Labeled

LAYERS = 3
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
clock_rate_ghz: 1.98 device_memory_size: 141000000000 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
registers_per_block_limit: 65536 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H200" """


class Message(NamedTuple):
    """An array that a collective makes."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


def model(*, scan: bool, dtype: str) -> Transformer:
    """Of numbers that no two axes of a weight or a batch share."""
    return Transformer(
        vocab=400, width=64, layers=LAYERS, heads=8, kv_heads=4, head_dim=24, mlp=160, scan=scan,
        dtype=dtype, tied=False, remat="full",
    )  # fmt: skip


def compiled(mesh, model: Transformer, *, rows: int = 16, length: int = 20) -> str:
    """The text of an update by Adam."""
    learner = Learner(
        model, objectives.mle, batch="text", optimizer=partial(adam, learning_rate=1e-3),
        microbatches=2, chunk=40,
    )  # fmt: skip
    config = Config("messages", 1, {"policy": learner}, {"text": dict})
    with jax.set_mesh(mesh):
        made = phases.build(config, mesh)

        def placed(x, place):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        state = jax.tree.map(placed, jax.eval_shape(made.init, 0), made.shardings)

        def row(*shape, dtype):
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.rows(mesh))

        batch = Labeled(
            tokens=row(length, dtype=jnp.int32),
            mask=row(length, dtype=bool),
            segments=row(length, dtype=jnp.int32),
            score=row(dtype=jnp.float32),
            token_score=row(length, dtype=jnp.float32),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        given = state.learners["policy"], {}, batch, key
        return made.update["policy"].lower(*given).compile().as_text()


def messages(text: str) -> list[Message]:
    """Every array that a collective of a compiled program makes."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({KINDS})(-start)?\(", line):
            for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                shape = tuple(int(n) for n in size.split(",") if n)
                found.append(Message(match[2], dtype, shape))
    return found


if __name__ == "__main__":
    shape, scan = json.loads(sys.argv[1]), sys.argv[2] == "True"
    there = topologies.get_topology_desc(
        topology_name="1x1x8", platform="cuda", topology="1x1x8", target_config=H200
    )
    mesh = sharding.make_mesh(shape, there.devices)
    print(json.dumps(messages(compiled(mesh, model(scan=scan, dtype="bfloat16")))))
