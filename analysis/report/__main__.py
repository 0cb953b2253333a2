"""``python -m topkbench.analysis.report``: build or merge reports."""

import sys

from topkbench.analysis.report.build import main

if __name__ == "__main__":
    sys.exit(main())
