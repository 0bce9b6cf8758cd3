"""The `grokmoe` command."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from grokmoe.errors import GrokmoeError
from grokmoe.logs import complain
from grokmoe.settings import add_flags, from_namespace

DESCRIPTION = "Grok-1 as a gRPC service with expert-parallel workers."

EPILOG = """\
examples:
  grokmoe serve                            the embedded demo model, everything in one process
  grokmoe up --experts 4                   the same, split over processes that talk gRPC
  grokmoe generate "To be, or not" --address 127.0.0.1:50051
  grokmoe generate -i                      the same in turns
A role on its own: python -m router | attention_worker | expert_worker, each with --help."""


def _parser() -> argparse.ArgumentParser:
    # Only what a command needs is imported: `generate` must not load torch.
    parser = argparse.ArgumentParser(
        "grokmoe", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="all roles in one process", add_help=False)
    commands.add_parser("up", help="every role a process, on this host", add_help=False)
    commands.add_parser("generate", help="continue a text, on the terminal", add_help=False)
    commands.add_parser("demo", help="start `up` with the demo model, stream a few texts, show figures", add_help=False)
    commands.add_parser(
        "checkpoint", help="look into a checkpoint, convert its tokenizer, make a random one", add_help=False
    )
    commands.add_parser("experts", help="who holds which experts; move them while requests run", add_help=False)
    commands.add_parser("top", help="what the cluster does now: workers, queue, load of the experts", add_help=False)
    commands.add_parser("loadtest", help="load a server on a schedule and report; compare two results", add_help=False)
    commands.add_parser("plan", help="what a cluster will do, and how large it has to be", add_help=False)
    return parser


def _serve(argv: Sequence[str]) -> int:
    from launcher.serve import ServeSettings, serve

    settings = _parse("serve", "Serves a model with all roles in one process.", ServeSettings, argv)
    _loop_run(serve(from_namespace(ServeSettings, settings)))
    return 0


def _up(argv: Sequence[str]) -> int:
    from launcher.up import UpSettings, up

    text = (
        "Starts expert workers, attention workers and a router as processes on this host. Prints a line per process\n"
        "when it is ready and READY <address> last. SIGTERM or Ctrl-C ends them all."
    )
    settings = _parse("up", text, UpSettings, argv)
    return _loop_run(up(from_namespace(UpSettings, settings)))


def _generate(argv: Sequence[str]) -> int:
    from launcher.generate import GenerateSettings, generate

    parser = argparse.ArgumentParser("grokmoe generate", description="Streams a continuation of a text.")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("-i", "--interactive", action="store_true", help="write a text in turns; /help explains")
    add_flags(parser, GenerateSettings)
    namespace = parser.parse_args(argv)
    settings = from_namespace(GenerateSettings, namespace)
    if namespace.interactive:
        from launcher.chat import chat

        return chat(namespace.prompt, settings)
    if namespace.prompt is None:
        parser.error("the text to continue is missing")
    return asyncio.run(generate(namespace.prompt, settings))


def _demo(argv: Sequence[str]) -> int:
    from launcher.demo import DemoSettings, demo

    text = "Starts the split topology with the demo model, streams a few texts and shows where the time went."
    return _loop_run(demo(from_namespace(DemoSettings, _parse("demo", text, DemoSettings, argv))))


def _checkpoint(argv: Sequence[str]) -> int:
    from launcher.checkpoint import add_arguments, checkpoint

    parser = argparse.ArgumentParser("grokmoe checkpoint", description="Looks into a checkpoint, prepares one.")
    add_arguments(parser)
    return checkpoint(parser.parse_args(argv))


def _experts(argv: Sequence[str]) -> int:
    from launcher.experts import EPILOG, add_arguments, experts

    text = "Shows who holds which experts, and moves them between expert workers while requests run."
    parser = argparse.ArgumentParser(
        "grokmoe experts", description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return experts(parser.parse_args(argv))


def _top(argv: Sequence[str]) -> int:
    from launcher.top import TopSettings, top

    text = "Shows workers, queue, tokens per second, load of the experts and where a step's time goes, until Ctrl-C."
    return top(from_namespace(TopSettings, _parse("top", text, TopSettings, argv)))


def _loadtest(argv: Sequence[str]) -> int:
    from launcher.loadtest import loadtest

    return loadtest(argv)


def _plan(argv: Sequence[str]) -> int:
    from launcher.plan import plan

    return plan(argv)


def _parse(command: str, text: str, settings: type, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"grokmoe {command}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, settings)
    return parser.parse_args(argv)


def _loop_run(coroutine: object) -> int:
    import uvloop

    return uvloop.run(coroutine) or 0  # type: ignore[arg-type]


COMMANDS = {
    "serve": _serve,
    "up": _up,
    "generate": _generate,
    "demo": _demo,
    "checkpoint": _checkpoint,
    "experts": _experts,
    "top": _top,
    "loadtest": _loadtest,
    "plan": _plan,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 1 with a message for an error that was foreseen."""
    argv = list(sys.argv[1:] if argv is None else argv)
    namespace, rest = _parser().parse_known_args(argv[:1])
    try:
        return COMMANDS[namespace.command]([*rest, *argv[1:]])
    except GrokmoeError as error:
        complain(f"grokmoe {namespace.command}", error.message)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
