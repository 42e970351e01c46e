"""What runs a training and is no idea of VAR: options, processes, files, checkpoints."""


class BadInput(ValueError):
    """What the user gave cannot be used; the scripts print it as one line and exit with 2."""
