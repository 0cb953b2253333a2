"""Rows say whether large tensors are in huge pages, as Linux has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_huge_pages_are_those_that_a_new_process_gets() -> None:
    """What torch allocates is read from Linux, not from what was asked for."""
    given = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not given.is_file() or "[madvise]" not in given.read_text():
        pytest.skip("needs Linux with transparent huge pages on request")
    script = (
        "from topkbench.harness.huge_pages import ask_for_huge_pages, has_huge_pages;"
        " ask_for_huge_pages(); print(has_huge_pages())"
    )
    for chosen, expected in ((None, "True"), ("0", "False")):
        own = {name: one for name, one in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        if chosen is not None:
            own["THP_MEM_ALLOC_ENABLE"] = chosen
        told = subprocess.check_output([sys.executable, "-c", script], text=True, env=own)
        assert told.strip() == expected
