"""Writes the chart's values.schema.json: values.schema.in.yaml, the roles' flags, and that every expert has a host.

    python deploy/chart_schema.py [--check]

A role's `settings` in the values are its flags, less those that the chart sets itself. Names, types and choices come
from the roles' own settings, so that a flag that is renamed or gone is found where the chart is checked, not in a pod.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from attention_worker.config import AttentionWorkerSettings  # noqa: E402
from expert_worker.config import ExpertWorkerSettings  # noqa: E402
from grokmoe.expert_units import SLICE_MULTIPLE  # noqa: E402
from grokmoe.server import ServerSettings  # noqa: E402
from launcher.gateway import GatewaySettings  # noqa: E402
from router.config import RouterSettings  # noqa: E402

SOURCE = HERE / "values.schema.in.yaml"
TARGET = HERE / "helm" / "grokmoe" / "values.schema.json"

SET_BY_CHART: dict[type, set[str]] = {
    ServerSettings: {
        "listen", "health_listen", "metrics_host", "metrics_port", "grace", "exit_on_stdin_eof", "max_connection_age",
        "tls_certificate", "tls_key", "tls_client_ca", "tokens_file", "log_format",
    },
    RouterSettings: {
        "model", "model_name", "variant", "dtype", "attention", "experts", "placement", "join_timeout",
        "traces", "trace_share", "pair_host",
        "worker_tls_ca", "worker_tls_certificate", "worker_tls_key", "worker_tls_server_name", "worker_token_file",
    },
    GatewaySettings: {
        "server", "model", "host", "port", "metrics_port", "grace", "exit_on_stdin_eof", "log_format", "traces",
    },
    AttentionWorkerSettings: {
        "model", "variant", "dtype", "device", "kv_gib", "layers", "traces", "tensor_parallel", "rank", "rendezvous",
    },
    ExpertWorkerSettings: {"model", "variant", "dtype", "device", "experts", "traces"},
}  # fmt: skip
"""Fields with a value of their own in the chart. Workers found by DNS have no order that `placement` could name."""

NUM_EXPERTS_OF_SCHEMA = 8
"""Of Grok-1. That experts beyond, and single layers, have a host is checked when the chart is rendered."""

SPEC = r"(all|[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?)*)"
MAX_SLICES = 64
"""Into which an expert is cut, by values. The worker itself takes more."""

SLICES = rf"(:{SPEC}/([1-9]|[1-5][0-9]|6[0-4]))?"
EXPERT_SPEC = rf"^{SPEC}{SLICES}(@{SPEC})?(\+{SPEC}{SLICES}(@{SPEC})?)*$"
"""The grammar of `--experts`, without blanks."""

DEVICE = "^(cpu|cuda(:[0-9]+)?)$"
"""What a worker's `--device` takes."""

JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema() -> dict[str, Any]:
    """The whole schema."""
    whole: dict[str, Any] = yaml.safe_load(SOURCE.read_text())
    definitions = whole["definitions"]
    definitions["routerSettings"] = flags(RouterSettings, ServerSettings)
    definitions["attentionSettings"] = flags(AttentionWorkerSettings, ServerSettings)
    definitions["expertSettings"] = flags(ExpertWorkerSettings, ServerSettings)
    definitions["gatewaySettings"] = flags(GatewaySettings)
    definitions["attentionDevice"] = {"type": "string", "pattern": DEVICE}
    definitions["expertSpec"] = {"type": "string", "pattern": EXPERT_SPEC}
    whole["allOf"] += [has_host(expert) for expert in range(NUM_EXPERTS_OF_SCHEMA)]
    whole["allOf"] += [divides(count) for count in range(2, MAX_SLICES + 1)]
    return whole


def flags(*kinds: type) -> dict[str, Any]:
    """An object with a property per flag of these settings that may be set."""
    properties = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name not in SET_BY_CHART[kind]:
                properties[field.name.replace("_", "-")] = flag(hints[field.name], field)
    return {"type": "object", "additionalProperties": False, "properties": dict(sorted(properties.items()))}


def flag(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The type of one flag."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if field.metadata["choices"]:
        return {"enum": list(field.metadata["choices"])}
    return {"type": JSON_TYPES.get(hint, "string")}


def has_host(expert: int) -> dict[str, Any]:
    """If the model has this expert, some pod of some pool names it."""
    assert expert < 10, "ranges are compared by their digits"
    first, last = f"[0-{expert}]", f"([{expert}-9]|[0-9]{{2,}})"
    named = rf"(^|[+])([0-9,-]+,)?(all|{expert}|{first}-{last})(,[0-9,-]+)?($|[:@+])"
    pool = {"required": ["pods"], "properties": {"pods": {"contains": {"type": "string", "pattern": named}}}}
    return {
        "if": {"properties": {"model": {"properties": {"numExperts": {"minimum": expert + 1}}}}},
        "then": {"properties": {"experts": {"properties": {"pools": {"contains": pool}}}}},
    }


def divides(count: int) -> dict[str, Any]:
    """If some pod holds a slice of so many, they are of one width, a multiple of what kernels take."""
    cut = {"properties": {"pods": {"contains": {"type": "string", "pattern": f"/{count}($|[@+])"}}}}
    return {
        "if": {"properties": {"experts": {"properties": {"pools": {"contains": cut}}}}},
        "then": {"properties": {"model": {"properties": {"ffnSize": {"multipleOf": SLICE_MULTIPLE * count}}}}},
    }


def text() -> str:
    """The schema as it lies in the chart."""
    return json.dumps(schema(), indent=1) + "\n"


def main() -> int:
    """Writes the schema, or compares it. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the chart's values.schema.json.")
    parser.add_argument("--check", action="store_true", help="only say whether it is as it should be")
    if parser.parse_args().check:
        return 0 if TARGET.read_text() == text() else 1
    TARGET.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
