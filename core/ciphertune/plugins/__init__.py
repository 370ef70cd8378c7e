"""Backends, transports and hook plugins, found by entry point."""
