"""`python -m grokmoe_image ROLE [ARGUMENTS]`: the entry point of the image.

A role replaces this process, so that it gets the signals and its exit code counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from grokmoe_image import names, triton_driver, weights
from grokmoe_image.placement import EXPERTS_OF, with_experts
from grokmoe_image.usage import UsageError

ROLES: Mapping[str, tuple[str, ...]] = {
    "router": ("router",),
    "attention-worker": ("attention_worker",),
    "expert-worker": ("expert_worker",),
    "gateway": ("launcher.gateway",),
    "serve": ("launcher", "serve"),
    "generate": ("launcher", "generate"),
    "checkpoint": ("launcher", "checkpoint"),
}
"""First word -> module that `python -m` runs, and the words before the arguments."""

TOOLS = {"fetch-weights": weights.fetch_main, "await-weights": weights.await_main, "await-names": names.main}

HELP = f"""\
usage: ROLE [ARGUMENTS]
roles: {", ".join(ROLES)}; each explains itself with --help
before them: {", ".join(TOOLS)}
expert-worker takes {EXPERTS_OF}=FILE for --experts: a JSON list, of which the pod's ordinal chooses one entry"""


def role_command(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What `python` is to be run with for a role. Raises UsageError."""
    role, *rest = arguments
    if role == "expert-worker":
        rest = with_experts(rest, environ)
    module, *words = ROLES[role]
    return ["-m", module, *words, *rest]


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a tool and returns its exit code, or becomes the role."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    word, *rest = arguments
    try:
        if word in TOOLS:
            return TOOLS[word](rest)
        if word not in ROLES:
            raise UsageError(f"there is no role {word!r}\n{HELP}")
        command = role_command(arguments, environ)
    except UsageError as error:
        print(f"{word}: error: {error}", file=sys.stderr)
        return 2
    triton_driver.seed(environ)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
