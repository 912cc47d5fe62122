"""Measured studies: each row in a process of its own, the results in one file."""
