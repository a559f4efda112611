"""Child processes that do not outlive their parent, not even one that is killed with SIGKILL. Knows nothing of what they run."""

import os
import sys
from collections.abc import Sequence

# Asks Linux to kill this process when the thread that started it ends, then becomes the command; elsewhere it only becomes the command.
_LAUNCH = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it died before we asked
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command line that runs `command`, whose first word is an absolute path, until it ends or the thread that starts it does."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]
