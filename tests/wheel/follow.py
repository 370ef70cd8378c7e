"""A page of the documentation as a shell script: its commands as they stand, its files written where it says.

``python follow.py PAGE | bash -eu`` does what a reader does who follows the page literally. Fences that count are
``sh``, ``sh fails`` for what must fail, and any with ``title="PATH"`` for files. Files are relative to where the
commands before have gone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def script(page: str) -> str:
    """The script. Raises ``ValueError`` for a page that has nothing to follow."""
    steps = []
    for info, body in _FENCE.findall(page):
        title = re.search(r'title="([^"]+)"', info)
        if title:
            end = "END_OF_FILE_THAT_NO_PAGE_HAS"
            steps.append(f"mkdir -p \"$(dirname '{title[1]}')\"\ncat > '{title[1]}' <<'{end}'\n{body}{end}\n")
        elif info == "sh":
            steps.append("set -x\n" + body + "{ set +x; } 2>/dev/null\n")
        elif info == "sh fails":
            steps.append(f"if (\n{body}) > /dev/null 2>&1; then echo 'this should have failed'; exit 1; fi\n")
    if not steps:
        raise ValueError("the page has nothing to follow")
    return "\n".join(steps)


if __name__ == "__main__":
    print(script(Path(sys.argv[1]).read_text(encoding="utf-8")))
