"""Runs fastbyol/train.py once for each list of arguments in a JSON file, in one process (or one torchrun): starts are what costs time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastbyol.train import main

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    main(arguments)
