"""Process-level services: threads, random numbers, file writes, terminal rendering."""
