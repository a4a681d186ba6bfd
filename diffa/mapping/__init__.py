"""Answer a question about every recording of a manifest, on one machine or a Ray cluster."""
