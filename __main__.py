"""The command line: `reelstep --help`. A command is a file in `engine/commands`."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from reelstep import __version__
from reelstep.engine.commands import COMMANDS
from reelstep.errors import AlreadyExists, ConfigError, InvalidRequest, NotFound, ReelstepError, UnsupportedRequest

USER_ERRORS = (ConfigError, InvalidRequest, UnsupportedRequest, NotFound, AlreadyExists)
"""Exit status 2."""
EXAMPLES = """\
examples:
  reelstep compile reel-tiny -o reel-tiny.reel      compile a model ahead of time
  reelstep serve reel-tiny.reel                     serve it on localhost:50051
  reelstep generate "a panda grows" -o panda.mp4     ask the server
  reelstep sample reel-tiny.reel "a panda grows" -o panda.webp   the same without a server
a bundle for another machine:
  reelstep keygen release                           release.key signs, release.pub verifies
  reelstep compile reel-tiny --portable --sign release.key
  reelstep finalize reel-tiny.reel --require-signature release.pub   there: build its native engines
exit status:
  0 done; 2 the command or the request is wrong; 1 a bundle, the disk, the machine, a build or a server cannot do it; 130 Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what is wrong with the command or the request; 1 for what a bundle, the disk, the machine, a build or a server makes of a right
    one; 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
        if sys.stdout is not None:  # which it is where it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads it any more; what is still to be written has to go somewhere
        return 1
    except KeyboardInterrupt:
        print("reelstep: cancelled", file=sys.stderr)
        return 130
    except ReelstepError as error:
        print(f"reelstep: {error}", file=sys.stderr)
        return 2 if isinstance(error, USER_ERRORS) else 1
    return 0


def command() -> int:
    """`main` in a process that ends with it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported: its own lines say in other words, and first, what our errors do
    ended: list[int] = []
    atexit.register(leave, ended)  # first, so that it runs last: threads have ended by then, and all that anybody registered has run
    ended.append(main())
    return ended[0]


def leave(ended: Sequence[int]) -> None:
    """End the process with this status at once: to take apart all that was imported takes a quarter of a second. Without one, `main` did not return."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a disk that is full, a pipe that nobody reads any more
            if stream is not None:
                stream.flush()
    if ended:
        os._exit(ended[0])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reelstep",
        description="Compile media-generation models and serve them over gRPC.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reelstep {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, each in COMMANDS.items():
        each.add_to(commands, name)
    return parser


if __name__ == "__main__":
    sys.exit(command())
