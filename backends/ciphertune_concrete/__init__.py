"""Zama's Concrete libraries as backends. They are extras, imported when one of these backends is first used."""
