"""Meshes: their sizes, slices and processes, and models that do not divide over them."""

import ast
import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest

from rlhf_jax import objectives, sharding
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, Learner


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that is not there."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_a_mesh_takes_what_devices_are_left():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert dict(sharding.make_mesh((2, -1, 2, 1)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "sequence": 1,
    }


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2), (-1, -1, 1, 1), (0, 1, 8, 1), (-2, 2, 2, 1)])
def test_a_mesh_needs_four_positive_sizes(shape):
    with pytest.raises(ValueError, match="needs four positive sizes"):
        sharding.make_mesh(shape)


def test_slices_lie_along_data_and_what_is_left_along_fsdp():
    """Eight devices in four slices: within one lies what differs in tensor."""
    devices = [Device(i, slice_index=i % 4) for i in range(8)]
    found = sharding.make_mesh((2, 2, 2, 1), devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(found)
    np.testing.assert_array_equal(slices[..., 0], [[[0, 0], [1, 1]], [[2, 2], [3, 3]]])


def test_tensor_and_sequence_never_leave_a_slice():
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    for shape in ((1, 1, 8, 1), (1, 1, 2, 4)):
        with pytest.raises(ValueError, match=r"2 slices .* of 4 devices.*can be 1, 2, 4$"):
            sharding.make_mesh(shape, devices)
    assert sharding.make_mesh((1, 2, 1, 4), devices).devices[0, 1, 0, 0].slice_index == 1


@pytest.mark.parametrize(
    ("shape", "shares"),
    [((4, 1, 2, 1), [0, 1, 2, 3]), ((1, 2, 2, 2), [0, 0, 1, 1]), ((1, 1, 4, 2), [0, 0, 0, 0])],
)
def test_processes_that_hold_the_same_rows_read_the_same_part_of_the_data(
    shape, shares, monkeypatch
):
    mesh = sharding.make_mesh(shape, [Device(i, process_index=i // 2) for i in range(8)])
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.row_share(mesh) == ((share,), max(shares) + 1)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 2, 2, 1), "fsdp 2 × tensor 2, and these are 4 of the 8 devices; try (2, 2, 2, 1)"),
        ((1, 3, 2, 1), "fsdp 3 × tensor 2, and these are 6 of the 8 devices; try (1, 4, 2, 1)"),
        ((4, 4, 1, 1), "data 4 × fsdp 4, and these are 16 of the 8 devices; try (2, 4, 1, 1)"),
        ((3, 1, 1, 1), "data 3, and these are 3 of the 8 devices; try (8, 1, 1, 1)"),
        ((1, 1, 1, 1), "one device, and these are 1 of the 8 devices; try (8, 1, 1, 1)"),
        ((1, -1, 3, 1), "3 does not divide the 8 devices; try (8, 1, 1, 1)"),
        ((3, -1, 2, 1), "6 does not divide the 8 devices; try (1, 4, 2, 1)"),
    ],
)
def test_a_mesh_of_other_devices_is_refused_with_the_nearest_that_uses_them(shape, says):
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        sharding.mesh_shape(shape, 8)
    tried = ast.literal_eval(str(refused.value).partition("try ")[2])
    assert sharding.mesh_shape(tried, 8) == tried


def stream(seed, shard, batch=8):
    raise AssertionError("a check reads no data")


def of(model, mesh, **changes):
    """An experiment with this model on this mesh."""
    model = replace(model, **changes)
    learner = Learner(model, objectives.mle, batch="text")
    return Config("x", 1, {"policy": learner}, {"text": partial(stream, batch=8)}, mesh=mesh)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ((1, 1, 8, 1), {}, "kv_heads=4 of the model of 'policy' cannot be split by tensor = 8; "
         "with this model tensor can be 1, 2, 4, and 8 needs a model with kv_heads=8"),
        ((2, 1, 4, 1), {"vocab": 50257, "mlp": 66}, "mlp=66, vocab=50257 .* tensor can be 1, and "
         "4 needs a model with mlp=68, vocab=50260"),
        ((1, 2, 1, 4), {"heads": 3, "kv_heads": 3, "width": 36}, "width=36 .* cannot be split by "
         "fsdp × sequence = 8; .* can be 1, 2, 3, 4, 6, and 8 needs a model with width=40"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_divide_over_a_mesh_is_refused_with_what_would(
    model, mesh, changes, message
):
    with pytest.raises(ConfigError, match=message):
        check(of(model, mesh, **changes), devices=8)


def test_a_model_that_divides_over_a_mesh_is_not_refused(model):
    for mesh in ((8, 1, 1, 1), (1, 2, 4, 1), (1, 1, 4, 2)):
        check(of(model, mesh), devices=8)
