"""What devices send each other in an update: one layer's weights, small as they are used; no more.

Read off the compiled program. The CPU's never has a reduce-scatter; the GPU's is compiled without
a GPU, where the plugin is there (`pip install jax-cuda12-plugin jax-cuda12-pjrt`).
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from math import prod
from os import environ
from pathlib import Path

import jax
import pytest
import toys
import update_messages as update

from rlhf_jax import sharding

ROWS, LENGTH = 16, 20


def weights(model):
    """Shapes of its matrices, of one layer."""
    shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    return {x.shape[-2:] for x in shapes if x.ndim > 1 and x.shape[-1] > 1 and x.shape[-2] > 3}


def check_gathers(found, model, small):
    """Gathers, and other moves without arithmetic, of weights: one matrix in the small dtype."""
    matrices = weights(model)
    assert len(matrices) == 7  # query, key = value, out, gate = up, down, embedding, head
    least, moved = min(map(prod, matrices)) // 8, []
    for kind, dtype, shape in found:
        if kind in ("all-reduce", "reduce-scatter") or prod(shape) < least:
            continue
        if shape[-2:] == (LENGTH, model.size_of_head) or shape[-2:] == (2, model.size_of_head):
            continue  # keys and values
        assert dtype == small, (kind, dtype, shape)  # no master, no moment
        assert len([n for n in shape if n > 1]) == 2, (kind, shape)  # no layers in front
        assert any(all(own % n == 0 for own, n in zip(m, shape, strict=True)) for m in matrices)
        moved.append(shape)
    assert len(set(moved)) >= 7  # so the pattern finds what is there


@pytest.mark.parametrize(
    ("shape", "scan"),
    [
        ((1, 4, 2, 1), True),
        pytest.param((1, 4, 2, 1), False, marks=pytest.mark.slow),
        pytest.param((2, 2, 2, 1), False, marks=pytest.mark.slow),
        pytest.param((2, 2, 2, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), True, marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), False, marks=pytest.mark.slow),
    ],
)
def test_an_update_gathers_one_layer_at_a_time_in_the_dtype_of_computing(shape, scan):
    """float16 stands for bfloat16, which the CPU's compiler widens before it sends it."""
    model = update.model(scan=scan, dtype="float16")
    with toys.standard_error() as written:
        text = update.compiled(sharding.make_mesh(shape), model, rows=ROWS, length=LENGTH)
        assert "Involuntary full rematerialization" not in written()
    check_gathers(update.messages(text), model, "f16")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("jax_cuda12_plugin") is None, reason="needs jax-cuda12-plugin and -pjrt; no GPU"
)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2)])
def test_on_gpus_every_gradient_of_a_matrix_is_reduced_to_its_own_part(shape, scan):
    """In one step with the sum, for every shape of a matrix; what is left is summed over data."""
    program = str(Path(__file__).parent / "update_messages.py")
    ran = subprocess.run(
        [sys.executable, program, json.dumps(shape), str(scan)],
        capture_output=True, text=True, timeout=600, env=environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Involuntary full rematerialization" not in ran.stderr
    found = [(kind, dtype, tuple(size)) for kind, dtype, size in json.loads(ran.stdout)]
    model = update.model(scan=scan, dtype="bfloat16")
    check_gathers(found, model, "bf16")
    scattered = {tuple(sorted(size[-2:])) for kind, _, size in found if kind == "reduce-scatter"}
    for a, b in weights(model):  # what tensor leaves of it, transposed or not
        assert {tuple(sorted((a // 2, b))), tuple(sorted((a, b // 2)))} & scattered, (a, b)
