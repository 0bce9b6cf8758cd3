"""The router's page in a real browser: it shows what the router says, and complains of nothing."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from grokmoe.metrics_http import start_http
from grokmoe.telemetry import new_registry
from router.status_page import status_pages
from tests import goldens
from tests.router.served import service
from tests.router.tiny import CONFIG, ExpertDouble
from tools import browser

PROGRAM = browser.find()

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here, and no package index has one: apt-get install chromium"
)


class Looked:
    """What a page of a router that has served a request shows."""

    def __init__(self, url: str, picture: Path) -> None:
        assert PROGRAM is not None
        with browser.browsing(PROGRAM) as page:
            page.open(url)
            page.wait("document.querySelectorAll('#workers td').length > 0")
            self.title = page.value("document.querySelector('h1').textContent")
            self.tiles = page.value("[...document.querySelectorAll('#tiles div')].map(each => each.textContent)")
            rows = (
                "[...document.querySelectorAll('#workers tr')].map(row => [...row.cells].map(cell => cell.textContent))"
            )
            self.workers = page.value(rows)[1:]
            heat = "[...document.querySelectorAll('#heat .cell')]"
            self.cells = page.value(f"{heat}.map(cell => cell.title)")
            self.shades = page.value(f"{heat}.map(cell => parseFloat(cell.style.opacity))")
            self.trouble = page.value("document.getElementById('trouble').textContent")
            # It looks again by itself, and then knows rates.
            page.wait("document.getElementById('heat-text').textContent.includes('rows/s')")
            self.overflow = page.value("document.documentElement.scrollWidth > innerWidth")
            page.picture(picture)
            self.complaints = page.complaints


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    picture, found = tmp_path_factory.mktemp("page") / "page.png", []

    async def look() -> None:
        async with service(expert_links=[ExpertDouble(range(4)), ExpertDouble(range(4, 8))]) as served:
            port = start_http("127.0.0.1", 0, new_registry(), status_pages(served.engine, "<b>tiny</b>"))
            await served.client.generate(goldens.PROMPTS["len33"], max_tokens=4, ignore_eos=True)
            browsing = threading.Thread(target=lambda: found.append(Looked(f"http://127.0.0.1:{port}/", picture)))
            browsing.start()
            await asyncio.to_thread(browsing.join)

    asyncio.run(look())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000, "an empty page"
    return found[0]


def test_it_shows_what_the_router_says(looked: Looked) -> None:
    assert looked.title == "grokmoe <b>tiny</b>", "names are text, not markup"
    assert any("running" in tile for tile in looked.tiles)
    assert [(row[0], row[2]) for row in looked.workers] == [
        ("attention", "ready"),
        ("expert", "ready"),
        ("expert", "ready"),
    ]
    assert looked.workers[1][6] == f"0,1,2,3@0-{CONFIG.num_layers - 1}"


def test_the_heat_map_has_every_layer_and_expert(looked: Looked) -> None:
    assert len(looked.cells) == CONFIG.num_layers * CONFIG.num_experts
    assert looked.cells[0].startswith("layer 0, expert 0: ")
    assert max(looked.shades) == pytest.approx(1.0)
    assert min(looked.shades) < 0.9, "all the same: it shows nothing"


def test_it_complains_of_nothing(looked: Looked) -> None:
    """No exception, nothing that its own policy refuses, nothing beside the page."""
    assert looked.complaints == []
    assert looked.trouble == ""
    assert not looked.overflow
