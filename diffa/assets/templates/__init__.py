"""A working part of every kind, copied by ``diffa plugin new``."""
