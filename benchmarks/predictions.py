"""How far the planner is from what was measured: steps of benchmarks/step, predicted from some of them.

    python -m benchmarks.step > demo.txt
    python -m benchmarks.step --preset bench > bench.txt
    python -m benchmarks.predictions --steps launcher/demo_model demo.txt --steps ~/.cache/grokmoe/bench bench.txt

Costs are fitted to a part of the measured steps and the others are predicted: two expert workers predict other numbers
of them, and each model the other one. Fused and split are fitted apart. A step counts as predicted only if nothing of
it was fitted. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grokmoe.model_config import ModelConfig
from planner.command import LOOPBACK
from planner.device import parse_groups
from planner.fitting import fit, predict
from planner.measured import Observation, read_steps
from planner.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One step, milliseconds. model: whose."""

    fitted_to: str
    model: str
    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


Steps = list[tuple[str, Observation]]


def cases(steps: Steps) -> dict[str, Callable[[str, Observation], bool]]:
    """What is fitted to, by name; the rest is predicted."""
    models = list(dict.fromkeys(model for model, _ in steps))
    batches = {"decode 1", "decode 32"}

    def is_part(observation: Observation) -> bool:
        name = observation.name.split(", ")[1]
        return observation.expert_workers in (0, 2) and (name in batches or name.startswith("prefill"))

    found: dict[str, Callable[[str, Observation], bool]] = {
        "all models, 2 workers, without decode 8": lambda model, each: is_part(each)
    }
    if len(models) > 1:
        for model in models:
            found[f"{model} alone"] = lambda name, each, model=model: name == model  # type: ignore[misc]
    return found


def run(steps: Steps, device_name: str) -> list[Prediction]:
    """All cases, fused and split."""
    device = parse_groups(device_name, PRESETS)[0].device
    found = []
    for case, is_fitted in cases(steps).items():
        for is_split in (False, True):
            here = [(model, each) for model, each in steps if (each.expert_workers > 0) == is_split]
            known = [each for model, each in here if is_fitted(model, each)]
            if not known:
                continue
            costs = fit(known, device, LOOPBACK, case)
            for model, each in here:
                if not is_fitted(model, each):
                    seconds = predict(each, device, LOOPBACK, costs)["all"]
                    found.append(Prediction(case, model, each.name, each.step * 1e3, seconds * 1e3))
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "a model's directory and what benchmarks/step wrote of it"
    parser.add_argument("--steps", nargs=2, action="append", required=True, metavar=("DIR", "FILE"), help=text)
    parser.add_argument("--device", default="cpu-small:bandwidth=25e9,flops=4e11", help="what it was measured on")
    options = parser.parse_args()
    steps = [
        (Path(directory).name, each)
        for directory, file in options.steps
        for each in read_steps(file, ModelConfig.from_file(directory))
    ]
    predictions = run(steps, options.device)
    console = Console(width=110)
    for case in dict.fromkeys(each.fitted_to for each in predictions):
        mine = [each for each in predictions if each.fitted_to == case]
        table = Table("model", "step", "measured ms", "predicted", "error", title=f"fitted to: {case}", box=None)
        for each in mine:
            error = f"{each.error * 100:+.0f} %"
            table.add_row(each.model, each.name, f"{each.measured:.1f}", f"{each.predicted:.1f}", error)
        console.print(table)
        errors = sorted(abs(each.error) for each in mine)
        console.print(f"{len(errors)} steps: median error {statistics.median(errors):.0%}, largest {errors[-1]:.0%}\n")
    print(json.dumps([dataclasses.asdict(each) for each in predictions]))


if __name__ == "__main__":
    main()
