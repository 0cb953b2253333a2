"""Who owns a file; imported without torch, so that the command starts quickly."""

import os


def is_of_this_user(status: os.stat_result) -> bool:
    """Return whether a file belongs to the user who runs this; True where files have no user."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
