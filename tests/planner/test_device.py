"""Devices as the command line and files write them."""

from __future__ import annotations

import dataclasses
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
    path.write_text(json.dumps({"mine": {**fields, "caches": [[2e6, 1e12], [1e6, 2e12]]}}))
    assert read_devices(path)["mine"].caches == ((1e6, 2e12), (2e6, 1e12))
    for text in ("[]", "{", '{"mine": {}}', '{"mine": {"kind": "tpu"}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="devices"):
            read_devices(path)


def test_a_device_does_not_compute_in_every_type() -> None:
    with pytest.raises(ConfigError, match="a100 does not compute in float8"):
        PRESETS["a100"].peak("float8")


MEASURED = Device(
    name="m",
    kind="cpu",
    memory=1,
    bandwidth=50.0,
    flops={"bfloat16": 1.0},
    price=0,
    cores=2,
    caches=((100.0, 200.0), (10_000.0, 50.0)),
    cold=3.0,
)


def test_a_working_set_is_read_as_fast_as_what_holds_it() -> None:
    assert MEASURED.read_rate(10) == MEASURED.read_rate(100) == 200
    assert MEASURED.read_rate(1000) == pytest.approx(125), "half way between, by their logarithms"
    assert MEASURED.read_rate(1e4) == MEASURED.read_rate(1e9) == 50
    assert PRESETS["h100"].read_rate(1.0) == PRESETS["h100"].bandwidth


def test_code_is_as_slow_as_its_place_in_the_caches_is_taken() -> None:
    assert MEASURED.slowdown(10) == 1
    assert MEASURED.slowdown(1e9) == 3
    assert MEASURED.slowdown(1000) == pytest.approx(1 + 2 * (1 / 125 - 1 / 200) / (1 / 50 - 1 / 200))
    assert PRESETS["h100"].slowdown(1e12) == 1
    level = dataclasses.replace(MEASURED, caches=((100.0, 50.0),))
    assert level.slowdown(1e9) == 1, "where every working set is read alike, nothing is displaced"
