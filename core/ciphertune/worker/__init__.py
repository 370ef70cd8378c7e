"""The untrusted side: weights, sessions and the evaluation of requests."""

from ciphertune.worker.entrance import Entrance
from ciphertune.worker.queueing import Quota
from ciphertune.worker.service import Service
from ciphertune.worker.sessions import SessionLimits
from ciphertune.worker.store import WeightStore
from ciphertune.worker.worker import Worker

__all__ = ["Entrance", "Quota", "Service", "SessionLimits", "WeightStore", "Worker"]
