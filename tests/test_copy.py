"""What rollouts read: weights that only tensor divides, as small as they are used; and panels."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import objectives, phases, sharding
from rlhf_jax.config import Config, Learner, Rollouts
from rlhf_jax.models import weights
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts


def built(model, shape):
    """The programs of a run on a mesh, and the policy's weights there."""
    config = Config(
        "copy",
        steps=1,
        learners={"policy": Learner(model, objectives.ppo)},
        data={"prompts": partial(dict, batch=8)},
        rollouts=Rollouts(lambda rollout, params: rollout.logp, length=4, reference=None),
    )
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        made = phases.build(config, mesh)
        return made, {"policy": made.init(0).learners["policy"].params}


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (2, 1, 4, 1)])
def test_rollouts_read_matrices_whole_but_for_tensor_and_as_small_as_they_are_used(model, shape):
    made, params = built(replace(model, dtype="bfloat16", scan=True), shape)
    found = weights.flat(made.written_with(params, ["policy"])["policy"])
    received = 0
    for name, x in weights.flat(params["policy"]).items():
        copy = found[name]
        norm = "norm" in name or "value_head" in name
        assert copy.dtype == (jnp.float32 if norm else jnp.bfloat16), name
        assert_array_equal(np.asarray(x).astype(copy.dtype), np.asarray(copy))
        part, own = (np.prod(y.addressable_shards[0].data.shape) for y in (copy, x))
        assert part == x.size // (1 if norm else shape[2]), name
        received += (part - own) * copy.dtype.itemsize
    assert made.copied == received
    assert (made.copied > 0) == (shape[1] * shape[3] > 1)


def test_weights_that_lie_as_they_are_read_are_not_copied(model):
    made, params = built(model, (2, 1, 4, 1))
    assert not made.copy
    assert made.written_with(params, ["policy"])["policy"] is params["policy"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_cpu_finds_panels_beside_the_weights_and_copies_nothing_else(model, dtype):
    made, params = built(replace(model, dtype=dtype), (1, 1, 1, 1))
    found = weights.flat(made.written_with(params, ["policy"])["policy"])
    own = weights.flat(params["policy"])
    panels = {name for name in found if name.endswith("panels")}
    kernels = {name[: -len("kernel")] for name in own if re.match(r"layers.*/kernel$", name)}
    assert panels == {f"{name}panels" for name in kernels | {"head/"}}
    assert {found[name].dtype for name in panels} == {jnp.dtype(dtype)}
    assert found.keys() - panels == own.keys()
    if dtype == "float32":
        assert all(found[name] is x for name, x in own.items())
    assert made.copied == 0


def test_what_is_written_with_panels_is_what_is_written_without(model):
    """Few rows read no other matrix: these are nan here."""
    wide = replace(model, width=64, mlp=128)
    made, params = built(wide, (1, 1, 1, 1))
    name = jnp.arange(8)
    prompts = Prompts(jnp.ones((8, 4), jnp.int32), jnp.full(8, 4), name, 0 * name)
    with jax.set_mesh(made.mesh):
        given = prompts, jax.random.key(0), Sampling()
        copy = weights.flat(made.written_with(params, ["policy"])["policy"])
        own = {n: x * jnp.nan if re.match(r"layers.*/kernel$", n) else x for n, x in copy.items()}
        found = made.generate(weights.nested(own), *given)
        expected = made.generate(params["policy"], *given)
    assert_array_equal(found.tokens, expected.tokens)
    assert_allclose(found.logp, expected.logp, atol=1e-5)


def test_no_weight_crosses_the_mesh_while_texts_are_written(model):
    """What is collected in the loop are a row's logits, and no array of texts either."""
    made, params = built(replace(model, dtype="float16", scan=True), (1, 2, 2, 2))
    name, rows = jnp.arange(16), sharding.rows(made.mesh)
    prompts = Prompts(jnp.ones((16, 4), jnp.int32), jnp.full(16, 4), name, 0 * name)
    copy = made.written_with(params, ["policy"])["policy"]
    with jax.set_mesh(made.mesh):
        given = copy, jax.device_put(prompts, rows), jax.random.key(0), Sampling(top_p=0.9)
        text = made.generate.lower(*given).compile().as_text()
    found = re.findall(
        r"= (\w+)\[([\d,]*)\]\S* all-gather\(.*op_name=\"\S*/while/body/(\S*)\"", text
    )
    assert found  # so the pattern finds what is there
    for dtype, size, where in found:
        rows, width = (int(n) for n in size.split(","))
        assert dtype == "f32" and rows <= 4 and width <= model.vocab + 4, (dtype, size, where)


def test_a_copy_of_stacked_layers_needs_little_room_of_its_own(model):
    """Beside what it reads and makes: XLA would hold all that it collects a second time.

    There are sixteen; a CPU collects in float32, and the own part is cast first.
    """
    model = replace(model, layers=16, mlp=256, dtype="bfloat16", scan=True)
    made, params = built(model, (1, 8, 1, 1))
    used = made.copy["policy"].lower(params["policy"]).compile().memory_analysis()
    assert used.temp_size_in_bytes < used.output_size_in_bytes / 2
