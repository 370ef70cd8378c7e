from ciphertune.testing import BackendSuite


class TestCKKS(BackendSuite):
    selection = "ckks"


class TestSimulationOfCKKS(BackendSuite):
    """The declared error is what the simulation of this backend adds."""

    selection = "simulation?of=ckks"
