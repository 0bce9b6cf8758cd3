"""`grokmoe plan`, from the command line to tables, JSON and values that the chart takes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grokmoe.errors import ConfigError
from launcher.__main__ import main
from planner.command import make_plan
from planner.device import GIB
from planner.settings import PlanSettings

ROOT = Path(__file__).resolve().parents[2]

QUICK = ["--num-requests", "60"]

PLANS = {
    "h100-bf16": ["--experts-on", "8*h100"],
    "h100-fp8": ["--experts-on", "8*h100", "--expert-dtype", "float8", "--copies", "2"],
    "h200": ["--experts-on", "7*h200", "--attention-on", "1*h200"],
    "mixed": ["--experts-on", "2*h200+2*h100+2*l40s+2*cpu-small"],
    "mi300x": ["--experts-on", "mi300x", "--attention-on", "mi300x", "--request-rate", "2", "--goodput", "tpot:1000"],
    "b200": ["--experts-on", "b200", "--expert-dtype", "float8"],
    "cpu": ["--experts-on", "cpu-small", "--lanes", "2"],
}


def plan(capsys, *flags: str) -> str:
    code = main(["plan", *QUICK, *flags])
    told = capsys.readouterr()
    assert code in (0, 3), told.err
    return told.out


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_says_what_it_says(name, capsys) -> None:
    told = plan(capsys, *PLANS[name])
    for word in (
        "What binds:",
        "expert workers",
        "TPOT p50, p99",
        "holds (EXPERTS@LAYERS)",
        "decode 32",
        "Costs: assumed",
    ):
        assert word in told


def test_json_has_the_same(capsys) -> None:
    told = json.loads(plan(capsys, "--json", *PLANS["h100-fp8"]))
    assert told["expert_workers"][0]["device"] == "h100"
    assert told["copies"] == 2
    assert told["copies"] * len(told["expert_workers"]) == 8
    assert set(told["steps"]["decode 8"]) == {"attention", "router", "messages", "wire", "experts", "step", "whole"}
    assert told["forecast"]["output_rate"] > 0


def test_eight_h100_hold_grok_1_once_in_bfloat16_and_twice_in_float8(capsys) -> None:
    told = json.loads(plan(capsys, "--json", *PLANS["h100-bf16"]))
    assert [worker["holds"] for worker in told["expert_workers"]] == [str(expert) for expert in range(8)]
    with pytest.raises(ConfigError, match="16 are needed"):
        make_plan(PlanSettings(experts_on="8*h100", copies=2))


def test_what_does_not_fit_is_an_error_of_the_command(capsys) -> None:
    assert main(["plan", "--experts-on", "4*h100"]) == 1
    assert "8 are needed" in capsys.readouterr().err
    assert main(["plan", "--experts-on", "8*h100+1*h200", "--copies", "2"]) == 1
    assert "one copy" in capsys.readouterr().err
    assert main(["plan", "--attention-on", "l40s", "--kv-gib", "40"]) == 1
    assert "KV pages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"network_gbps": 0},
        {"copies": 0},
        {"calibrate": ("a",)},
        {"calibrate": ("a",), "calibrate_model": "m", "costs": "c"},
        {"fused": True, "values": "v"},
        {"num_requests": 1},
        {"router": "inside", "values": "v"},
        {"skew": 1.0},
        {"failures": ("expert:0@1s",)},
        {"fused": True, "simulate": 1.0},
        {"simulate": -1.0},
    ],
)
def test_settings_that_cannot_be(changes) -> None:
    with pytest.raises(ConfigError):
        PlanSettings(**changes)


def test_the_exit_code_says_whether_the_goals_hold(capsys) -> None:
    easy = ["--experts-on", "8*h100", "--attention-on", "h100", "--goodput", "ttft:100000", "tpot:100000"]
    assert main(["plan", *QUICK, *easy]) == 0
    assert main(["plan", *QUICK, *easy[:-2], "ttft:1", "tpot:1"]) == 3


def test_a_faster_network_is_not_slower(capsys) -> None:
    slow, fast = (
        json.loads(plan(capsys, "--json", "--network-gbps", rate, *PLANS["h100-bf16"]))["steps"]["prefill 512"]
        for rate in ("10", "400")
    )
    assert fast["wire"] < slow["wire"]
    assert {leg: fast[leg] for leg in fast if leg not in ("wire", "whole")} == {
        leg: slow[leg] for leg in slow if leg not in ("wire", "whole")
    }


def test_fused_has_no_wire(capsys) -> None:
    told = json.loads(plan(capsys, "--json", "--fused", "--experts-on", "cpu", "--attention-on", "cpu"))
    assert told["steps"]["decode 8"]["wire"] == told["steps"]["decode 8"]["messages"] == 0


def test_a_router_inside_and_rows_by_pairs_serve_more(capsys) -> None:
    devices = ["--experts-on", "4*h100", "--attention-on", "1*h100", "--expert-dtype", "float8"]
    goals = ["--goodput", "ttft:8000", "tpot:400"]

    def rate(*flags: str) -> float:
        return json.loads(plan(capsys, "--json", *devices, *goals, *flags))["forecast"]["rate"]

    assert rate() < rate("--router", "inside") < rate("--router", "inside", "--rows", "pairs")
    assert "inside the attention workers" in plan(capsys, *devices, *goals, "--router", "inside")


SIMULATED = ["--experts-on", "2*cpu-small", "--model", str(ROOT / "launcher" / "demo_model"), "--request-rate", "8"]
SIMULATED += ["--output-len", "16", "--input-len", "64", "--simulate", "2"]


def test_a_plan_is_simulated_worker_by_worker(capsys) -> None:
    told = plan(capsys, *SIMULATED, "--failures", "expert:0@1s+0.5s", "attention:0@1.5+0.1")
    for words in ("Simulated worker by worker", "expert 0", "attention 0", "longest stall s", "busy, mean and most"):
        assert words in told
    found = json.loads(plan(capsys, "--json", *SIMULATED, "--mtbf-hours", "0.001", "--repair-seconds", "0.1"))
    assert found["simulated"]["unfinished"] == 0
    assert len(found["simulated"]["effects"]) > 0
    assert json.loads(plan(capsys, "--json", *SIMULATED[:-2]))["simulated"] is None


def test_failures_of_workers_that_are_not_there(capsys) -> None:
    assert main(["plan", *QUICK, *SIMULATED, "--failures", "router:7@1s"]) == 1
    assert "failure of router 7" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_simulation_too(capsys) -> None:
    """Experts that are lost for good: the plan holds, what is simulated does not."""
    assert main(["plan", *QUICK, *SIMULATED]) == 0
    assert main(["plan", *QUICK, *SIMULATED, "--failures", "expert:0@1s"]) == 3


def test_a_model_of_a_directory(capsys) -> None:
    told = plan(capsys, "--model", str(ROOT / "launcher" / "demo_model"), "--experts-on", "2*cpu-small")
    assert "0.007" in told, "billion weights"


@pytest.mark.parametrize("name", PLANS)
def test_the_chart_renders_a_plans_values(name, capsys, tmp_path, monkeypatch) -> None:
    """By deploy/render_chart.py, as one more profile."""
    spec = importlib.util.spec_from_file_location("render_chart", ROOT / "deploy" / "render_chart.py")
    assert spec is not None
    assert spec.loader is not None
    render_chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render_chart)
    chart = tmp_path / "grokmoe"
    shutil.copytree(render_chart.CHART, chart)
    for profile in (chart / "profiles").glob("*.yaml"):
        profile.unlink()
    plan(capsys, "--values", str(chart / "profiles" / "planned.yaml"), *PLANS[name])
    monkeypatch.setattr(render_chart, "CHART", chart)
    (made,) = render_chart.render(tmp_path / "out", "grok", "testing")
    objects = [each for path in made.rglob("*.yaml") for each in yaml.safe_load_all(path.read_text()) if each]
    sets = [each for each in objects if each["kind"] == "StatefulSet" and "experts" in each["metadata"]["name"]]
    values = yaml.safe_load((chart / "profiles" / "planned.yaml").read_text())
    told = sum(len(pool["pods"]) * pool["copies"] for pool in values["experts"]["pools"])
    assert sum(each["spec"]["replicas"] for each in sets) == told
    assert values["attention"]["kvGib"] * GIB > 0


def test_a_plan_for_more_than_one_release_is_said_to_be(capsys, tmp_path) -> None:
    flags = ["--copies", "24", "--values", str(tmp_path / "v.yaml")]
    assert main(["plan", *QUICK, *flags]) == 1
    assert "a release has at most 16 copies" in capsys.readouterr().err


def test_costs_are_fitted_saved_and_used(capsys, tmp_path) -> None:
    legs = {"attention": {"ms": 5.0}, "gate": {"ms": 0.5}, "wire": {"ms": 8.0}, "expert": {"ms": 6.0}}
    fixed = {"topology": "split 2", "name": "decode", "prompt": 32, "new": 32, "ms": 22.0, "legs": legs}
    step = tmp_path / "step.txt"
    limits = {"split 2": {"bandwidth": [[1e6, 2e11], [5e8, 3e10]], "flops": 9e11, "cold": 1.5}}
    rows = [{**fixed, "batch": batch} for batch in (1, 8)]
    step.write_text(json.dumps({"rows": rows, "threads": 2, "limits": limits}))
    model = str(ROOT / "launcher" / "demo_model")
    saved = tmp_path / "costs.json"
    fitted = ["--calibrate", str(step), "--calibrate-model", model, "--save-costs", str(saved)]
    told = plan(capsys, "--experts-on", "2*cpu-small", "--model", model, *fitted)
    assert "Costs: fitted to" in told
    assert told == plan(capsys, "--experts-on", "2*cpu-small", "--model", model, "--costs", str(saved))


def test_the_planner_needs_no_torch() -> None:
    code = "import sys; import launcher.plan, planner.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
