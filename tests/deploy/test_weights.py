"""A checkpoint over HTTP: whole, checked, continued, and waited for; and names that pods wait for."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grokmoe_image import names, weights
from grokmoe_image.usage import UsageError
from grokmoe_image.weights import COMPLETE, FetchError, WantedFile, fetch, is_complete, parse_list

CONTENTS = {"config.json": b"{}", "shards/model-1.safetensors": bytes(range(256)) * 40, "empty": b""}


class Files(http.server.BaseHTTPRequestHandler):
    """Serves CONTENTS, in parts where asked to. Class attributes say what goes wrong, and what was asked for."""

    cut_after = 0
    ignores_ranges = False
    asked: list[tuple[str, str | None, str | None]] = []  # noqa: RUF012 - made anew by the fixture

    def do_GET(self) -> None:
        kind = type(self)
        name, part = self.path.removeprefix("/base/"), self.headers.get("Range")
        kind.asked.append((name, part, self.headers.get("Authorization")))
        if name not in CONTENTS:
            self.send_error(404)
            return
        whole = CONTENTS[name]
        begin = int(part.removeprefix("bytes=").removesuffix("-")) if part and not kind.ignores_ranges else 0
        if begin and begin >= len(whole):
            self.send_error(416)
            return
        body = whole[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind.cut_after and len(body) > kind.cut_after:
            body, kind.cut_after = body[: kind.cut_after], 0
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def files() -> Iterator[tuple[str, type[Files]]]:
    """Where they are served, and by whom."""
    kind = type("Files", (Files,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/base/", kind
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.time, "sleep", lambda seconds: None)


def checksums(contents: dict[str, bytes] = CONTENTS) -> str:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())


LIST = parse_list(checksums())


def test_all_files_come_and_are_checked(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    url, kind = files
    fetch(url, LIST, tmp_path, token="secret")
    assert {name: (tmp_path / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert is_complete(tmp_path, LIST)
    assert not list(tmp_path.rglob("*.part"))
    assert {authorization for *_, authorization in kind.asked} == {"Bearer secret"}


def test_what_is_there_is_not_fetched_again(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    url, kind = files
    fetch(url, LIST, tmp_path)
    kind.asked.clear()
    fetch(url, LIST, tmp_path)
    assert not kind.asked
    (tmp_path / COMPLETE).unlink()
    (tmp_path / "config.json").write_bytes(b"other")
    fetch(url, LIST, tmp_path)
    assert [name for name, *_ in kind.asked] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_broken_download_goes_on(files: tuple[str, type[Files]], tmp_path: Path, ignores_ranges: bool) -> None:
    url, kind = files
    kind.cut_after, kind.ignores_ranges = 1000, ignores_ranges
    fetch(url, LIST, tmp_path, parallel=1)
    assert (tmp_path / "shards/model-1.safetensors").read_bytes() == CONTENTS["shards/model-1.safetensors"]
    assert ("shards/model-1.safetensors", "bytes=1000-", None) in kind.asked


def test_a_download_that_was_whole_but_not_renamed_is_used(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    url, _ = files
    (tmp_path / "config.json.part").write_bytes(b"{}")
    fetch(url, LIST, tmp_path)
    assert is_complete(tmp_path, LIST)


def test_a_file_that_is_not_what_the_list_says_is_not_kept(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    url, _ = files
    wrong = [*LIST[1:], WantedFile("config.json", "0" * 64)]
    with pytest.raises(FetchError, match=r"SHA-256 is .*, must be 000"):
        fetch(url, wrong, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not is_complete(tmp_path, wrong)


def test_a_file_that_is_not_there_is_not_asked_for_again(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    url, kind = files
    with pytest.raises(FetchError, match="404"):
        fetch(url, [WantedFile("gone", "0" * 64)], tmp_path)
    assert len(kind.asked) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{'a' * 64}  ../../etc/passwd", "no path within the folder"),
        (f"{'a' * 64}  /etc/passwd", "no path within the folder"),
        (f"{'a' * 64}  a/../../b", "no path within the folder"),
        (f"{'a' * 64}", "no path within the folder"),
        ("abc  file", "no SHA-256"),
        (f"{'g' * 64}  file", "no SHA-256"),
        ("\n", "is empty"),
    ],
)
def test_a_list_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_list(text)


def test_the_commands(files: tuple[str, type[Files]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = files
    (tmp_path / "checksums").write_text(checksums())
    common = [f"--checksums={tmp_path}/checksums", f"--folder={tmp_path}/model"]
    assert weights.fetch_main([f"--base-url={url}", *common]) == 0
    assert weights.await_main(common) == 0
    (tmp_path / "checksums").write_text(checksums({"gone": b""}))
    assert weights.fetch_main([f"--base-url={url}", *common]) == 1
    assert "gone: HTTP Error 404" in capsys.readouterr().err


def test_waiting_ends_when_the_list_is_whole_and_not_for_another(tmp_path: Path) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            (tmp_path / COMPLETE).write_text(weights.digest_of_list(LIST[:1]))
        else:
            (tmp_path / COMPLETE).write_text(weights.digest_of_list(list(reversed(LIST))) + "\n")

    weights.wait(tmp_path, LIST, sleep)
    assert len(looks) == 2


def test_one_name_of_each_group_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    there: set[str] = {"a-0"}

    def sleep(seconds: float) -> None:
        assert names.missing(groups, there.__contains__) == [["b-0", "b-1"]]
        there.add("b-1")

    groups = [["a-0", "a-1"], ["b-0", "b-1"]]
    names.wait(groups, there.__contains__, sleep)
    assert "waiting for b-0 or b-1" in capsys.readouterr().err


def test_names_are_resolved() -> None:
    assert names.resolves("127.0.0.1")
    assert not names.resolves("no-such-name.invalid")
    assert names.main(["--any=no-such-name.invalid,127.0.0.1"]) == 0
