"""Devices as the command line and files write them."""

from __future__ import annotations

import json

import pytest

from grokmoe.errors import ConfigError
from planner.device import Device, Group, parse_groups, read_devices
from planner.presets import PRESETS


def test_names_counts_and_changes() -> None:
    assert parse_groups("h100", PRESETS) == (Group(PRESETS["h100"]),)
    two, four = parse_groups("2*h200+4*l40s", PRESETS)
    assert (two.count, two.device.name, four.count, four.device.name) == (2, "h200", 4, "l40s")
    (changed,) = parse_groups("cpu:memory=512,bandwidth=4e11,flops=3e13,price=2", PRESETS)
    device = changed.device
    assert (device.memory, device.bandwidth, device.price) == (512, 4e11, 2)
    assert set(device.flops.values()) == {3e13}
    assert PRESETS["cpu"].memory != 512, "the preset is another object"


@pytest.mark.parametrize(
    "text",
    ["", "h99", "0*h100", "h100:memory", "h100:memory=much", "h100:colour=1", "h100+h200", "h100:memory=0", "-1*h100"],
)
def test_what_is_none_of_it(text) -> None:
    with pytest.raises(ConfigError):
        parse_groups(text, PRESETS)


def test_a_file_of_devices(tmp_path) -> None:
    path = tmp_path / "devices.json"
    fields = {"kind": "cuda", "memory": 24, "bandwidth": 1e12, "flops": {"bfloat16": 1e14}, "price": 0.5}
    path.write_text(json.dumps({"mine": fields}))
    assert read_devices(path) == {"mine": Device(name="mine", **fields)}
    for text in ("[]", "{", '{"mine": {}}', '{"mine": {"kind": "tpu"}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="devices"):
            read_devices(path)


def test_a_device_does_not_compute_in_every_type() -> None:
    with pytest.raises(ConfigError, match="a100 does not compute in float8"):
        PRESETS["a100"].peak("float8")
