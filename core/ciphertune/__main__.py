"""``python -m ciphertune``."""

from ciphertune.cli import main

if __name__ == "__main__":
    main()
