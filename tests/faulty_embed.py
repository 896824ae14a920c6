"""`python -m fastbyol` with small parts of an embedding and one fault: FAULT=kill:rank:parts, or empty. It says FAULT before it strikes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from fastbyol.__main__ import main
from fastbyol.evaluation import embedding

embedding.PART_ROWS = 4
inner, written = embedding._WorkFolder.write, 0


def write(self: Any, part: int, blocks: list[Any]) -> None:
    global written
    inner(self, part, blocks)
    written += 1
    _, rank, parts = os.environ["FAULT"].split(":")
    if os.environ.get("RANK", "0") == rank and written == int(parts):
        print(f"FAULT kill on rank {rank} after {written} parts", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("FAULT"):
    embedding._WorkFolder.write = write  # type: ignore[method-assign]
if __name__ == "__main__":
    main()
