"""The one exception for what a user can put right, and how programs end with it."""

import os
import sys


class UserError(Exception):
    """Bad input, a bad configuration or a broken environment.

    The message names the file or key, what was found, what was expected and what to do. The programs in `tools/`
    print it as one line `error: ...` and end with status 2; it is never shown as a traceback.
    """


def fail(error: UserError) -> int:
    """Print the error, with the process it comes from where there are several, and return the exit status 2."""
    rank = os.environ.get("RANK")
    print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
    return 2
