from ciphertune.testing import BackendSuite


class TestSlalom(BackendSuite):
    """With so few pads that most products need another pass over the weights."""

    selection = "slalom?tokens=8"


class TestSimulationOfSlalom(BackendSuite):
    """The declared error is what the simulation of this backend adds."""

    selection = "simulation?of=slalom"
