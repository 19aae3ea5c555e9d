"""The command line: ``lmnfast grok``, ``measure``, ``checkpoints``, ``paper``, ``tiles``, ``solve``, ``plan``, ``info``."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._parser import parser

# The exit codes that a shell reports after Ctrl-C and after SIGTERM.
INTERRUPTED, TERMINATED = 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM came. The work ends as after Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the arguments of the command line; None: those of this process.

    Returns:
        The exit code: 0; 2 for bad input, which an error message names in one line; 130 after Ctrl-C; 143 after SIGTERM.
    """
    options = parser().parse_args(_in_new_spelling(sys.argv[1:] if arguments is None else arguments))
    try:
        with _terminated_as_interrupted():
            from ._commands import COMMANDS  # here, because that imports torch, and Ctrl-C may come meanwhile

            COMMANDS[options.command](options)
    except KeyboardInterrupt as stop:
        word, code = (
            ("terminated", TERMINATED) if isinstance(stop, _Terminated) else ("interrupted", INTERRUPTED)
        )
        print(f"\nlmnfast: {word}{options.after_interrupt}", file=sys.stderr)
        return code
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lmnfast: error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """In this context SIGTERM raises `_Terminated`, once; a second one ends the process at once."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_new_spelling(arguments: list[str]) -> list[str]:
    """Turns the old name ``measure --model`` into ``checkpoints --model``, and prints a note."""
    names = {argument.partition("=")[0] for argument in arguments}
    if arguments[:1] != ["measure"] or not names & {"--model", "--mode", "--mod", "--mo"}:
        return arguments
    print(
        "lmnfast: measure --model has a name of its own now: lmnfast checkpoints --model ...", file=sys.stderr
    )
    return ["checkpoints", *arguments[1:]]


if __name__ == "__main__":
    sys.exit(main())
