"""Pictures in: one reader per data set, their registry, and batches."""


class BadInput(ValueError):
    """What the user gave cannot be used; the scripts print it as one line and exit with 2."""
