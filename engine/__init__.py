"""Support for training that is not part of the idea of VAR. It never imports a chapter."""


class BadInput(ValueError):
    """The user's input cannot be used. The scripts print it as one line and exit with status 2."""
