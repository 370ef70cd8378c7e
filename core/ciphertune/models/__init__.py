"""Models by name, with and without weights."""
