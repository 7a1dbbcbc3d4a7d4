"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Bad input from outside the program: one line saying what was given and what would be accepted.

    The command prints the line and exits with code 2. Wrong arguments to a function of the library are plain
    `ValueError` or `TypeError`.
    """
