"""Outsourced layers in the place of linear ones."""
