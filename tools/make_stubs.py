"""Generates grokmoe/v1 from proto/; with --check only says whether what is committed is fresh."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))


def generate(target: Path) -> None:
    """Writes the modules of all protos below `target`, at the paths of their packages."""
    flags = [f"--{kind}={target}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", *flags, *map(str, PROTOS)]):
        sys.exit("protoc failed")


def stale() -> list[str]:
    """Committed modules that differ from what the protos give, are missing, or should not be there."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = Path(directory) / "grokmoe" / "v1"
        committed = ROOT / "grokmoe" / "v1"
        names = {path.name for path in fresh.iterdir()}
        names |= {path.name for path in committed.glob("*_pb2*")}
        return sorted(
            name
            for name in names
            if not ((fresh / name).exists() and (committed / name).exists())
            or not filecmp.cmp(fresh / name, committed / name, shallow=False)
        )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a module is stale")
    if not parser.parse_args().check:
        generate(ROOT)
    elif names := stale():
        sys.exit(f"stale stubs, run `make stubs`: {', '.join(names)}")


if __name__ == "__main__":
    main()
