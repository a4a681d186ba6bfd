"""Specs: name the parts of a model, check them against the installed plugins, fill in defaults."""
