"""Makes ``tests/helpers`` importable, for scripts that are started from anywhere and by themselves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
