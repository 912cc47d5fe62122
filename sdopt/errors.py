import sys


class UserError(ValueError):
    """Bad input, told in one line: what is wrong and what to do. The command line prints it and exits with code 2."""


def exit_code(call) -> int:
    """Run a command, `call()`; returns its exit code, or 2 for a UserError, which becomes one line on stderr."""
    try:
        return call() or 0
    except UserError as error:
        print(f"sdopt: {error}", file=sys.stderr)
        return 2
