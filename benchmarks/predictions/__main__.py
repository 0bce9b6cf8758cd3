"""How far the planner is from what `grokmoe up` does here.

    python -m benchmarks.predictions                    from what was measured: the table, and into docs/scaling.md
    python -m benchmarks.predictions --measure          measures what the file does not have yet; --fresh: everything
    python -m benchmarks.predictions --measure 1        no more than one topology, a minute or two, and so on by and by
    python -m benchmarks.predictions --check            whether the page is what comes out

Costs are fitted to a part of the measured steps, and all others are predicted: each size of model from the others,
other numbers of workers and lanes from two workers with one. Beside each measurement the machine's limits were
measured; they are the roofs of both fit and prediction. Nothing predicted was fitted to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.predictions.cases import outcomes
from benchmarks.predictions.configurations import Topology, topologies
from benchmarks.predictions.measurements import read, write
from benchmarks.predictions.report import changed, page, put

FILE = Path(__file__).parent / "measured.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="of measurements (default: the repository's)")
    parser.add_argument("--measure", type=int, nargs="?", const=sys.maxsize, default=0, metavar="N")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is another")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "grokmoe", help="where models are kept")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load (default: 3)")
    options = parser.parse_args()
    if options.fresh:
        options.file.unlink(missing_ok=True)
    if options.measure:
        _measure(options)
    measured = read(options.file).undisturbed
    text = page(measured, outcomes(measured), outcomes(measured, is_split=False))
    if options.check:
        is_same = changed(PAGE.read_text(), text) == PAGE.read_text()
        print(f"{PAGE.name} {'is' if is_same else 'is not'} what the measurements give")
        return 0 if is_same else 1
    print(text)
    if options.file == FILE:
        put(PAGE, text)
    return 0


def _measure(options: argparse.Namespace) -> None:
    from benchmarks.predictions.measuring import measure  # torch, which a table needs not

    tried: set[Topology] = set()
    for _ in range(options.measure):
        known = read(options.file)
        missing = [each for each in topologies() if each not in known.undisturbed.topologies and each not in tried]
        if not missing:
            break
        print(f"measuring {missing[0]}", file=sys.stderr, flush=True)
        tried.add(missing[0])
        write(options.file, known.with_new(measure(missing[0], options.cache, options.rounds)))


if __name__ == "__main__":
    sys.exit(main())
