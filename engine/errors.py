"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input, a bad configuration or a broken environment.

    The message names the file or key, what was found, what was expected and what to do. The programs in `tools/`
    print it as one line `error: ...` and end with status 2; it is never shown as a traceback.
    """
