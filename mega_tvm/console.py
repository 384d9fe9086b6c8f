"""What the commands share: the console, and how errors end them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from rich.console import Console

from reference.config import ConfigError

from .errors import MegaError

USAGE_ERROR = 2
FAILURE = 1


def console() -> Console:
    """Return a console for people; into a pipe it keeps lines whole, which one greps for."""
    return Console(highlight=False, soft_wrap=True)


def print_settings(out: Console, title: str, settings: Mapping[str, object]) -> None:
    """Print resolved settings, one a line."""
    out.print(title, style="bold")
    width = max(len(name) for name in settings)
    for name, value in settings.items():
        out.print(f"  {name:<{width}}  {value}", markup=False)


def run_command(command: Callable[[], int]) -> int:
    """Run a command; an error of ours becomes one line on standard error and exit status 2."""
    try:
        return command()
    except (MegaError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
