"""Half an adapter."""


class Half:
    """Lacks ``out_lengths``."""

    def __init__(self, source, width):
        self.source, self.width = source, width

    def __call__(self, features):
        """Return the features as they are."""
        return features
