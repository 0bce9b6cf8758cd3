"""`grokmoe plan`: what a cluster will do, before it is there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from grokmoe.settings import add_flags, from_namespace
from planner.as_json import as_json
from planner.command import make_plan
from planner.helm_values import helm_values
from planner.settings import PlanSettings
from planner.tables import describe

DESCRIPTION = """\
Plans a cluster: does the model fit, how fast is a step and what does it wait for, which latencies under which load, how
many workers, at which price. Without --request-rate it says what the devices can serve within the objectives; with it,
which number of them is the cheapest that serves it. docs/scaling.md has the formulas, and how far they were from
measurements.

exit codes: 0; 1 an error, also a model that does not fit; 3 the objectives do not hold"""

EPILOG = """\
examples:
  grokmoe plan --experts-on '8*h100' --expert-dtype float8
  grokmoe plan --experts-on h200 --attention-on h200 --request-rate 20 --input-len 500 --output-len 200
  grokmoe plan --experts-on '2*h200+2*h100+2*l40s+2*cpu-small' --values plan.yaml
  grokmoe plan --experts-on h100:price=2.1,bandwidth=3e12 --goodput ttft:4000 tpot:400
  grokmoe plan --experts-on h100 --request-rate 8 --simulate 60 --failures expert:3@20s+15s attention:0@40s+5s
  grokmoe plan --calibrate step.txt --calibrate-model DIR --save-costs costs.json"""

DOES_NOT_HOLD = 3
LIST_FLAGS = ("goodput", "calibrate", "failures")


def plan(argv: Sequence[str]) -> int:
    """Parses the command line and plans. Returns the exit code. Raises GrokmoeError."""
    parser = argparse.ArgumentParser(
        "grokmoe plan", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, PlanSettings)
    for action in parser._actions:
        if action.dest in LIST_FLAGS:
            action.nargs = "+"
    namespace = parser.parse_args(argv)
    for name in LIST_FLAGS:
        given = getattr(namespace, name)
        setattr(namespace, name, tuple(part for each in given for part in ((each,) if isinstance(each, str) else each)))
    settings = from_namespace(PlanSettings, namespace)
    made = make_plan(settings)
    print(json.dumps(as_json(made), indent=1) if settings.json else describe(made))
    if settings.values:
        Path(settings.values).write_text(helm_values(made))
    return 0 if made.holds else DOES_NOT_HOLD
