"""A working part of every kind, from which ``diffa.scaffold`` makes a plugin's first version."""
