"""Compose a model, a task and a method, run them, and record what came out.

python run.py method=hata k=512 -m
"""

import sys
from pathlib import Path

# A bare checkout works too, and its folders stay reachable under their import root alone.
sys.path[0] = str(Path(__file__).resolve().parent / ".types")

from topkbench.harness.main import main  # noqa: E402

if __name__ == "__main__":
    main()
