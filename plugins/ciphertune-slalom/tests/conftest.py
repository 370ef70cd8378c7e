pytest_plugins = ["ciphertune.testing.fixtures"]
