"""Bundles: a model split into the part that a data owner holds and the parts that workers hold."""

from ciphertune.bundle.client import load_client as load_client
from ciphertune.bundle.worker import load_worker as load_worker
from ciphertune.bundle.writer import SplitResult as SplitResult, split as split
