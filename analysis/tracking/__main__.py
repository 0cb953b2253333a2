"""``python -m topkbench.analysis.tracking dashboard``: build the project's W&B workspace."""

import sys

from topkbench.analysis.tracking.tracker import main

if __name__ == "__main__":
    sys.exit(main())
