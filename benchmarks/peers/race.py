"""Round by round, one contender alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.peers import machine
from benchmarks.peers.child import PeerFailed
from benchmarks.peers.contender import Contender
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.workload import Workload

Say = Callable[[str], None]


async def race(
    contenders: Sequence[Contender], workload: Workload, rounds: int, say: Say, keep: Callable[[Results], None]
) -> Results:
    """All samples. A contender that is missing or fails is named and left out, of the race or of that round.

    say: receives a line per event. keep: called after each contender's turn with all there is.
    """
    results = Results()
    present = []
    for contender in contenders:
        if lack := contender.missing():
            say(f"{contender.row}: not here. {lack}")
        else:
            present.append(contender)
    for number in range(rounds):
        for contender in present:
            try:
                with machine.foreign() as foreign:
                    measured = await contender.measure(workload, number)
            except PeerFailed as error:
                say(f"round {number + 1}, {contender.row}: {error}")
                continue
            for row, values in measured.items():
                results.add(Sample(number, row, metric, value, foreign.share) for metric, value in values.items())
            say(f"round {number + 1}, {contender.row}: done, others used {foreign.share:.0%} of the machine")
            keep(results)
    return results
