from ciphertune.testing import BackendSuite


class TestCKKS(BackendSuite):
    selection = "ckks"


class TestCKKS29(BackendSuite):
    selection = "ckks?modulus_bits=29"
