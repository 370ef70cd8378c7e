"""A run's report: one page that needs nothing but a browser."""

from ciphertune.report.account import Account, Accountant
from ciphertune.report.page import render, write_report

__all__ = ["Account", "Accountant", "render", "write_report"]
