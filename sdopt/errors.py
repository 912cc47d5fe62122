class UserError(ValueError):
    """Bad input, told in one line: what is wrong and what to do. The command line prints it and exits with code 2."""
