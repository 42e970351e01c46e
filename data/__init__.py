"""The data sets of this project, one loader each, with what shows and judges their pictures."""


class BadInput(ValueError):
    """What the user gave cannot be used; the scripts print it as one line and exit with 2."""
