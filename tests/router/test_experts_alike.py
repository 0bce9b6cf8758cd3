"""Workers that store their experts in different types give different bits, so a pool has workers of one kind only."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from grokmoe.errors import ConfigError
from router.experts import ExpertPool
from router.experts.fitness import check_alike
from router.worker_state import WorkerEvent
from tests.router.tiny import CONFIG, DTYPE, ExpertDouble, expert_info


def stored_in(expert_dtype: str) -> ExpertDouble:
    link = ExpertDouble()
    link.info = dataclasses.replace(link.info, expert_dtype=expert_dtype)
    return link


@pytest.mark.parametrize("kind", ["", "int8"])
def test_workers_of_one_kind_fit(kind: str) -> None:
    check_alike("one", expert_info(expert_dtype=kind), {})
    check_alike("one", expert_info(expert_dtype=kind), {"two": expert_info([1], expert_dtype=kind)})


def test_both_are_named() -> None:
    others = {"two": expert_info(), "three": expert_info(expert_dtype="int8")}
    with pytest.raises(ConfigError, match=r"^one has its experts in float32, three in int8"):
        check_alike("one", expert_info(), others)
    with pytest.raises(ConfigError, match=r"^one has its experts in int8, two in float32"):
        check_alike("one", expert_info(expert_dtype="int8"), others)


def test_the_second_of_another_kind_is_refused() -> None:
    async def main() -> None:
        pool = ExpertPool(CONFIG, DTYPE, [stored_in("int8"), stored_in(""), stored_in("int8")])
        try:
            await pool.connect(pool.members[0])
            with pytest.raises(ConfigError, match=r"expert worker 1 at .* in float32, expert worker 0 at .* in int8"):
                await pool.connect(pool.members[1])
            assert pool.members[1].info is None
            await pool.connect(pool.members[2])
            await pool.connect(pool.members[0])  # it does not stand in its own way
        finally:
            await pool.close()

    asyncio.run(main())


def test_who_is_away_does_not_count() -> None:
    """Else workers that are restarted one after another with another type would keep each other out for ever."""

    async def main() -> None:
        old, other = stored_in(""), stored_in("int8")
        pool = ExpertPool(CONFIG, DTYPE, [old, other])
        try:
            await pool.connect(pool.members[0])
            old.is_up = False
            pool.lose(pool.members[0], WorkerEvent.FAILED, "gone")
            await pool.connect(pool.members[1])
            assert pool.members[1].is_usable
            old.is_up = True
            with pytest.raises(ConfigError, match="must be alike"):
                await pool.connect(pool.members[0])
            assert not pool.members[0].is_usable
        finally:
            await pool.close()

    asyncio.run(main())


def test_one_that_changes_while_it_is_in_use_is_refused() -> None:
    async def main() -> None:
        links = [stored_in("int8"), stored_in("int8")]
        pool = ExpertPool(CONFIG, DTYPE, links)
        try:
            for member in pool.members:
                await pool.connect(member)
            pool.place()
            links[1].info = dataclasses.replace(links[1].info, expert_dtype="", incarnation="two")
            with pytest.raises(ConfigError, match="must be alike"):
                await pool.describe_again(pool.members[1])
        finally:
            await pool.close()

    asyncio.run(main())
