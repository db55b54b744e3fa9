"""The one exception for what a user can put right, and how programs end with it."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Bad input, a bad configuration or a broken environment.

    The message names the file or key, what was found, what was expected and what to do. The programs in `tools/`
    print it as one line `error: ...` and end with status 2; it is never shown as a traceback.
    """


def program(main: Callable[P, int]) -> Callable[P, int]:
    """Decorator for a program's `main`: a UserError becomes one line and status 2, Ctrl-C status 130."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            rank = os.environ.get("RANK")  # of several processes, the one that has the error
            print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
