"""Published checkpoints: find, download and read them (``read``, ``hub``)."""
