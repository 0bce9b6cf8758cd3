"""Every command line in every pod is one that the role of today takes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from grokmoe_image import names, weights
from grokmoe_image.__main__ import ROLES, TOOLS, role_command

import launcher.generate
from attention_worker.config import AttentionWorkerSettings
from expert_worker.config import ExpertWorkerSettings
from grokmoe.server import ServerSettings
from grokmoe.settings import add_flags, from_namespace
from launcher.__main__ import main as launcher_main
from launcher.gateway import GatewaySettings, smg_flags
from launcher.generate import GenerateSettings
from router.config import RouterSettings
from tests.deploy.rendered import CASES, PROFILES, Object, containers, objects, of_kind, profile, waits_for

SETTINGS: dict[str, tuple[type, ...]] = {
    "router": (RouterSettings, ServerSettings),
    "attention-worker": (AttentionWorkerSettings, ServerSettings),
    "expert-worker": (ExpertWorkerSettings, ServerSettings),
    "generate": (GenerateSettings,),
    "gateway": (GatewaySettings,),
}


GATED = [case for case in CASES if CASES[case].get("gateway", {}).get("openai", {}).get("enabled")]


def named(argument: str) -> str:
    """The field that a flag sets."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def experts_file(case: str, template: Object, container: Object, folder: Path) -> Path:
    """What the pod finds under `--experts-of`, as a file."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects(case), "ConfigMap") if "data" in each}
    volume = next(one for one in template["spec"]["volumes"] if one["name"] == "experts")
    path = folder / f"{volume['configMap']['name']}.json"
    path.write_text(maps[volume["configMap"]["name"]]["experts.json"])
    return path


def command_lines(case: str, folder: Path) -> list[tuple[str, list[str]]]:
    """(role, what `python` is run with) of every role of every pod; of an expert worker one per ordinal."""
    found = []
    for each, template, container in containers(objects(case)):
        role, *arguments = container["args"]
        if role in TOOLS:
            continue
        if role != "expert-worker":
            # As the controller of a group would have them.
            index = "1" if container["name"] == "rank" else "0"
            variables = {"$(LWS_WORKER_INDEX)": index, "$(LWS_LEADER_ADDRESS)": "demo-0.demo.testing"}
            for variable, value in variables.items():
                arguments = [one.replace(variable, value) for one in arguments]
            found.append((role, role_command([role, *arguments], {})))
            continue
        path = experts_file(case, template, container, folder)
        local = [f"--experts-of={path}" if one.startswith("--experts-of=") else one for one in arguments]
        for ordinal in range(each["spec"]["replicas"]):
            found.append((role, role_command([role, *local], {"POD_INDEX": str(ordinal)})))
    return found


def accepts(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a role's own main up to where it would serve; ends as it would for arguments that it does not take."""
    served: list[tuple[object, ServerSettings]] = []

    async def serve(settings: object, server: ServerSettings) -> None:
        served.append((settings, server))

    role = importlib.import_module(f"{module}.__main__")
    monkeypatch.setattr(role, "serve", serve)
    assert role.main(list(arguments)) == 0
    assert len(served) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case not in PROFILES or not waits_for(case)])
def test_every_role_takes_its_arguments(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = command_lines(case, tmp_path)
    assert {role for role, _ in lines} == set(SETTINGS) - (set() if case in GATED else {"gateway"})
    for role, (_, module, *arguments) in lines:
        if role == "generate":

            async def accepted(prompt: str, settings: GenerateSettings) -> int:
                return 0

            monkeypatch.setattr(launcher.generate, "generate", accepted)
            assert launcher_main(arguments) == 0
        elif role == "gateway":
            parser = argparse.ArgumentParser()
            add_flags(parser, GatewaySettings)
            assert smg_flags(from_namespace(GatewaySettings, parser.parse_args(arguments)), tmp_path / "servers")
        else:
            accepts(module, arguments, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_flags_have_their_full_names_and_come_once(case: str, tmp_path: Path) -> None:
    """argparse takes the beginning of a name, and the last of two: neither is meant here."""
    for role, (_, _, *arguments) in command_lines(case, tmp_path):
        fields = {field.name for kind in SETTINGS[role] for field in dataclasses.fields(kind)}
        flags = [named(one) for one in arguments if one.startswith("--")]
        waited = {named(argument) for _, argument in (waits_for(case) if case in PROFILES else ())}
        assert {flag.removeprefix("no_") if flag not in fields else flag for flag in flags} - waited <= fields
        assert len(set(flags) - waited) == len([flag for flag in flags if flag not in waited])


@pytest.mark.parametrize("case", [case for case in PROFILES if waits_for(case)])
def test_what_a_profile_waits_for_is_all_that_is_missing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When this fails because the role has learnt it, take the line off the profile's head and docs/deploy.md."""
    waited = set(waits_for(case))
    for role, (_, module, *arguments) in command_lines(case, tmp_path):
        missing = [argument for of, argument in waited if of == role]
        for argument in missing:
            assert argument in arguments
        rest = [one for one in arguments if one not in missing]
        if role != "generate":
            accepts(module, rest, monkeypatch)
        if missing:
            with pytest.raises(SystemExit):
                accepts(module, arguments, monkeypatch)
            assert any(f"--{named(one)}".replace("_", "-") in capsys.readouterr().err for one in missing)
    assert waited


@pytest.mark.parametrize("case", CASES)
def test_tools_take_their_arguments(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {each["metadata"]["name"]: each.get("data", {}) for each in of_kind(objects(case), "ConfigMap")}
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(names, "wait", lambda groups, *rest: seen.append(("names", groups)))
    monkeypatch.setattr(weights, "wait", lambda folder, files, sleep: seen.append(("await", files)))
    monkeypatch.setattr(weights, "fetch", lambda url, files, *rest: seen.append(("fetch", files)))
    checksums = tmp_path / "checksums"
    checksums.write_text(maps.get("demo-grokmoe-checksums", {}).get("checksums", ""))
    (tmp_path / "token").write_text("t")
    for _, _, container in containers(objects(case)):
        tool, *arguments = container["args"]
        if tool in TOOLS:
            local = [
                one.replace("/etc/grokmoe/checksums/checksums", str(checksums)).replace(
                    "/etc/grokmoe/source/token", str(tmp_path / "token")
                )
                for one in arguments
            ]
            assert TOOLS[tool](local) == 0
    kinds = {kind for kind, _ in seen}
    assert kinds == ({"names", "await", "fetch"} if case == "download" else {"names"})
    assert all(len(files) == 2 for kind, files in seen if kind in ("await", "fetch"))


def test_the_images_roles_are_modules_that_run() -> None:
    for module, *_ in ROLES.values():
        program = module if module.startswith("launcher.") else f"{module}.__main__"
        assert importlib.util.find_spec(program) is not None


def test_settings_become_flags(tmp_path: Path) -> None:
    """Numbers without exponents, switches both ways."""
    from tests.deploy.rendered import objects_of

    values = profile("laptop")
    values["router"]["settings"] = {"max-waiting": 12000000, "hedge-quantile": 0.95, "refuse-control-symbols": False}
    (router,) = [one for _, _, one in containers(objects_of(values)) if one["name"] == "router"]
    assert {"--max-waiting=12000000", "--hedge-quantile=0.95", "--no-refuse-control-symbols"} <= set(router["args"])
    assert json.dumps(router["args"])  # all of them strings
    assert all(isinstance(one, str) for one in router["args"])
