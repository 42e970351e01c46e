"""What runs a training: options, processes, files, checkpoints, presets. It calls no chapter."""


class BadInput(ValueError):
    """What the user gave cannot be used; the scripts print it as one line and exit with 2."""
