"""Predictions of what a run costs, before anything runs."""
