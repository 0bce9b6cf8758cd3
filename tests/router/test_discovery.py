"""Where workers are: lists, names and files, and what changes between two looks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError, Unavailable
from router.discovery import Changes, Discovery, Sources, changes, parse_addresses, pipelines, stages_of
from tests.router.tiny import until

ADDRESSES = st.lists(st.sampled_from("abcdefgh"), max_size=12)


@given(ADDRESSES, ADDRESSES)
def test_changes_lead_from_one_list_to_the_other(known: list[str], found: list[str]) -> None:
    change = changes(known, found)
    assert (set(known) | set(change.added)) - set(change.removed) == set(found)
    assert not set(change.added) & set(known)
    assert set(change.removed) <= set(known)
    assert len(change.added) == len(set(change.added))
    assert list(change.added) == [address for address in dict.fromkeys(found) if address in change.added]
    assert bool(change) == (set(known) != set(found))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:1\nb:2\n", ["a:1", "b:2"]),
        ("# workers\n a:1  # first\n\nb:2\na:1", ["a:1", "b:2"]),
        ('["a:1", "b:2"]', ["a:1", "b:2"]),
        ("", []),
        ("[]", []),
    ],
)
def test_contents_of_a_file(text: str, found: list[str]) -> None:
    assert parse_addresses(text) == found


@pytest.mark.parametrize("text", ["[1]", '["a', '[""]', "[[]]"])
def test_contents_that_are_no_list(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_addresses(text)


@given(st.lists(st.from_regex(r"[a-z]{1,8}:[0-9]{1,4}", fullmatch=True), unique=True))
def test_both_forms_of_a_file_say_the_same(addresses: list[str]) -> None:
    assert parse_addresses(json.dumps(addresses)) == parse_addresses("\n".join(addresses)) == addresses


class TestPipelines:
    @pytest.mark.parametrize(
        ("entry", "stages"),
        [
            ("a:1", ("a:1",)),
            ("unix:/a", ("unix:/a",)),
            ("b:1+a:1", ("a:1", "b:1")),
            (" unix:/b + unix:/a ", ("unix:/a", "unix:/b")),
            ("[fd00::1]:7+10.0.0.1:7+a-0.b.svc:7", ("10.0.0.1:7", "[fd00::1]:7", "a-0.b.svc:7")),
        ],
    )
    def test_the_stages_of_an_entry(self, entry: str, stages: tuple[str, ...]) -> None:
        assert stages_of(entry) == stages

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ("a:1+", "'' is none"),
            ("a:1++b:1", "'' is none"),
            ("a+b:1", "'a' is none"),
            ("a:1+dns:///b:1", "'dns:///b:1' is none"),
            ("a:1+file:/b:1", "'file:/b:1' is none"),
            ("unix:/in+a/folder", "'a/folder' is none"),
            ("a:1+b:1+a:1", "names a stage twice"),
        ],
    )
    def test_what_is_no_pipeline(self, entry: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            stages_of(entry)
        with pytest.raises(ConfigError, match=words):
            Sources([entry], pipelines)

    def test_a_worker_is_in_one_pipeline_only(self) -> None:
        assert pipelines(["b:1+a:1", "c:1", "a:1+b:1"]) == ["a:1+b:1", "c:1"], "the same one twice is one"
        with pytest.raises(ConfigError, match=r"b:1 is in a:1\+b:1 and in b:1\+c:1"):
            Sources(["a:1+b:1", "b:1+c:1"], pipelines)
        with pytest.raises(ValueError, match=r"b:1 is in a:1\+b:1 and in b:1"):
            pipelines(["a:1+b:1", "b:1"])

    def test_names_stand_for_whole_workers(self) -> None:
        with pytest.raises(ConfigError, match=r"stages of a pipeline are named one by one"):
            Sources(["dns:///a:1+dns:///b:1"], pipelines)

    def test_a_file_of_pipelines(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "workers"
        path.write_text("# two\nb:1+a:1\nc:1+d:1\n")
        sources = Sources([f"file:{path}", "e:1"], pipelines)
        assert find(sources) == ["a:1+b:1", "c:1+d:1", "e:1"]
        path.write_text("a:1 + b:1\nc:1+d:1\n")
        assert find(sources) == ["a:1+b:1", "c:1+d:1", "e:1"], "in whatever order stages are named"
        for trouble in ("a:1+b:1\nb:1+c:1\n", "a:1+\n"):
            path.write_text(trouble)
            assert find(sources) == ["a:1+b:1", "c:1+d:1", "e:1"], "what cannot be changes nothing"
        assert "b:1 is in a:1+b:1 and in b:1+c:1" in caplog.text
        path.write_text("d:1+c:1\n")
        assert find(sources) == ["c:1+d:1", "e:1"]


def find(sources: Sources) -> list[str]:
    return asyncio.run(sources.find())


class TestSources:
    def test_a_static_list(self) -> None:
        sources = Sources(["a:1", "unix:/b", "a:1"])
        assert find(sources) == ["a:1", "unix:/b"]
        assert not sources.may_change

    @pytest.mark.parametrize(
        "entry", ["dns:///name", "dns:///:5", "dns:///name:x", "dns:///name:0", "dns:///name:65536"]
    )
    def test_names_that_cannot_be(self, entry: str) -> None:
        with pytest.raises(ConfigError, match="must be dns:///name:port"):
            Sources([entry])

    def test_every_address_of_a_name(self, resolver: Resolver) -> None:
        resolver.hosts = ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]
        sources = Sources(["dns:///experts.example:7002", "a:1"])
        assert sources.may_change
        assert find(sources) == ["10.0.0.1:7002", "10.0.0.2:7002", "[fd00::1]:7002", "a:1"]
        assert resolver.asked == [("experts.example", 7002)]

    def test_a_resolver_that_fails_takes_nobody_away(
        self, resolver: Resolver, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        resolver.hosts = ["10.0.0.1"]
        sources = Sources(["dns:///experts:1"])
        assert find(sources) == ["10.0.0.1:1"]
        for hosts in ([], None, None):
            resolver.hosts = hosts
            assert find(sources) == ["10.0.0.1:1"]
        assert len(caplog.records) == 2, "every trouble is told once"
        resolver.hosts = ["10.0.0.9"]
        assert find(sources) == ["10.0.0.9:1"]

    def test_a_file_that_changes(self, tmp_path: Path) -> None:
        path = tmp_path / "workers"
        sources = Sources([f"file:{path}"])
        assert find(sources) == []
        path.write_text("a:1\n")
        assert find(sources) == ["a:1"]
        path.write_text("a:1\nb:2\n")
        assert find(sources) == ["a:1", "b:2"]
        path.write_text('["half')
        assert find(sources) == ["a:1", "b:2"], "it is being written"
        path.write_text("")
        assert find(sources) == ["a:1", "b:2"]
        other = tmp_path / "other"
        other.write_text("c:3\n")
        os.replace(other, path)
        assert find(sources) == ["c:3"]
        path.unlink()
        assert find(sources) == ["c:3"]

    def test_a_file_replaced_by_one_of_the_same_size_and_time(self, tmp_path: Path) -> None:
        path, other = tmp_path / "workers", tmp_path / "other"
        path.write_text("a:1\n")
        sources = Sources([f"file:{path}"])
        assert find(sources) == ["a:1"]
        other.write_text("b:1\n")
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        os.replace(other, path)
        assert find(sources) == ["b:1"]

    def test_at_start_every_source_must_have_said_something(self, tmp_path: Path) -> None:
        path = tmp_path / "workers"

        async def main() -> None:
            sources = Sources(["a:1", f"file:{path}"])
            with pytest.raises(Unavailable, match=f"no address within 0.02 s from file:{path}"):
                await sources.first(0.02, 0.001)
            waiting = asyncio.create_task(sources.first(30.0, 0.001))
            path.write_text("b:2")
            assert await waiting == ["a:1", "b:2"]

        asyncio.run(main())


class Resolver:
    """hosts: what it answers; None: an error."""

    def __init__(self) -> None:
        self.hosts: list[str] | None = []
        self.asked: list[tuple[str, int]] = []

    def getaddrinfo(self, name: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append((name, port))
        if self.hosts is None:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in self.hosts]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    return resolver


def test_a_name_of_this_machine() -> None:
    assert "127.0.0.1:5" in find(Sources(["dns:///localhost:5"]))


class TestDiscovery:
    def test_changes_are_told_as_they_come(self, tmp_path: Path) -> None:
        path = tmp_path / "workers"
        path.write_text("a:1\nb:2\n")
        seen: list[Changes] = []

        async def main() -> None:
            sources = Sources([f"file:{path}"])
            discovery = Discovery(sources, await sources.find(), seen.append, interval=0.001)
            discovery.start()
            path.write_text("b:2\nc:3\nd:4\n")
            await until(lambda: seen != [])
            path.write_text("b:2\n")
            await until(lambda: len(seen) > 1)
            discovery.stop()

        asyncio.run(main())
        assert seen == [Changes(("c:3", "d:4"), ("a:1",)), Changes((), ("c:3", "d:4"))]

    def test_a_list_that_cannot_change_is_not_looked_at(self) -> None:
        async def main() -> None:
            discovery = Discovery(Sources(["a:1"]), [], lambda _: None, interval=0.001)
            discovery.start()
            assert len(asyncio.all_tasks()) == 1
            discovery.stop()

        asyncio.run(main())

    def test_an_error_in_what_follows_does_not_end_it(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "workers"
        path.write_text("a:1\n")
        seen: list[Changes] = []

        async def apply(change: Changes) -> None:
            seen.append(change)
            if len(seen) == 1:
                raise ValueError("a bug")

        async def main(told: Callable[[Changes], Any]) -> None:
            discovery = Discovery(Sources([f"file:{path}"]), [], told, interval=0.001)
            discovery.start()
            await until(lambda: len(seen) == 1)
            path.write_text("a:1\nb:2\n")
            await until(lambda: len(seen) == 2)
            discovery.stop()

        asyncio.run(main(apply))
        assert seen == [Changes(("a:1",)), Changes(("b:2",))]
        assert "a bug" in caplog.text
