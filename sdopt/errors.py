import os
import sys


class UserError(ValueError):
    """Bad input, told in one line: what is wrong and what to do. The command line prints it and exits with code 2."""


def first_line(error: Exception, width: int = 160) -> str:
    """What `error` says, in one line of up to `width` characters; its type where it says nothing."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= width else text[: width - 3] + "..."


def exit_code(call) -> int:
    """Run a command, `call()`; returns its exit code, or 2 for a UserError, which becomes one line on stderr.

    141, as a shell has it, where nobody reads on.
    """
    try:
        code = call() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except UserError as error:
        print(f"sdopt: {error}", file=sys.stderr)
        return 2
