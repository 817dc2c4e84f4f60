"""Programs that tests start with two processes."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """End this process when all have come this far, without destructors.

    A thread of gloo may still hold a tensor of the last exchange and want the interpreter's lock to let it go, while
    the interpreter waits for that thread, or goes down under it: the process then hangs, or aborts.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
