"""`grokmoe generate`: flags become options, and what is printed where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme

from tests.shared.fake_generation import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_text_goes_to_standard_output_and_figures_to_standard_error(server: FakeServer) -> None:
    told = generate("Say ", "--address", server.address)
    assert (told.returncode, told.stdout) == (0, "Say Hello\n")
    assert "3 + 4 tokens, finish length, first after 500 ms, 2.7 tokens/s" in told.stderr
    told = generate("Say ", "--address", server.address, "--no-echo", "--no-stats")
    assert (told.stdout, told.stderr) == ("Hello\n", "")


def test_flags_become_options(server: FakeServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object"}))
    flags = ("--stop=END", "--min-p=0.25", "--repetition-penalty=1.5", "--seed=3", f"--json-schema={schema}")
    assert generate("x", "--address", server.address, *flags).returncode == 0
    assert generate("x", "--address", server.address, "--regex=[0-9]+").returncode == 0
    first, second = server.generation.requests
    assert list(first.stopping.stop_strings) == ["END"]
    assert (first.sampling.min_p, first.sampling.repetition_penalty, first.sampling.seed) == (0.25, 1.5, 3)
    assert json.loads(first.structured.json_schema) == {"type": "object"}
    assert second.structured.regex == "[0-9]+"
    assert not second.sampling.HasField("min_p")


def test_a_table_of_logprobs(server: FakeServer) -> None:
    told = generate("x", "--address", server.address, "--logprobs=2", "--no-stats")
    text, head, *rows = told.stdout.splitlines()
    assert text == "xHello"
    assert head.split() == ["token", "logprob", "rank", "most", "likely"]
    assert [row.split()[1:] for row in rows] == [["-1.500", "2", "'d'", "-1.00", "'e'", "-2.00"]] * 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "the text to continue is missing"),
        (("x", "--json-schema=/nowhere"), 1, "json_schema /nowhere"),
        (("x", "--token-file=/nowhere"), 1, "token_file /nowhere"),
        (("x", "--tls-ca=/nowhere"), 1, "ca /nowhere"),
        (("x", "--address=,"), 1, "address is ','"),
        (("-i", "--tls-key=x"), 1, "certificate and its key go together"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], code: int, words: str) -> None:
    told = generate(*arguments)
    assert told.returncode == code
    assert words in told.stderr
    assert "Traceback" not in told.stderr


def test_tls_and_a_token(tmp_path: Path) -> None:
    authority = trustme.CA()
    cert = authority.issue_cert("grokmoe.example")
    chain = b"".join(pem.bytes() for pem in cert.cert_chain_pems)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "token").write_text("sesame\n")
    with FakeServer(credentials=grpc.ssl_server_credentials([(cert.private_key_pem.bytes(), chain)])) as server:
        flags = (f"--tls-ca={tmp_path}/ca.pem", "--tls-server-name=grokmoe.example", f"--token-file={tmp_path}/token")
        told = generate("x", "--address", server.address, *flags)
        assert told.returncode == 0, told.stderr
        assert server.generation.metadata[0]["authorization"] == "Bearer sesame"
