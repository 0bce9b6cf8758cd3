"""The check of the contract against the last release catches what would break a client."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def breaks(protos: Path) -> subprocess.CompletedProcess[str]:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    command = [buf, "breaking", str(protos), "--against", str(ROOT / "proto" / "released.binpb")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_contract_breaks_no_client() -> None:
    told = breaks(ROOT / "proto")
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("optional float top_p = 3;", "optional double top_p = 3;", "top_p"),
        ("uint32 prompt_tokens = 1;", "uint32 prompt_tokens = 9;", "prompt_tokens"),
        ("rpc Score(ScoreRequest) returns (ScoreResponse);", "", "Score"),
    ],
)
def test_a_change_that_breaks_clients_is_caught(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    protos = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", protos)
    path = protos / "grokmoe" / "v1" / "generation.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    told = breaks(protos)
    assert told.returncode != 0
    assert complaint in told.stdout
