"""A Ray cluster: workers of a bundle are actors, placed by the memory they need and started again when they die.

Nothing is imported here: the command line asks this package for its commands, which must not take long.
"""
