"""What test_torchrun.py starts with torchrun: the toy experiment of `two_processes.training`, and its accidents.

torchrun_toy.py WORK_DIR [accident ...], one for each attempt of torchrun, as `STEP:RANK:KIND`. The kinds: `hang`,
`die`, and `stop` (torchrun itself gets SIGUSR1, or SIGTERM where it passes on no other, before torch 2.10).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from engine.config import Length, Loaded
from engine.errors import program
from engine.resume import open_work_dir
from tests.engine import toy

TIMEOUT = 0.15  # minutes
PASSES_ON = "--signals-to-handle" in get_args_parser().format_help()


def accident(kind: str) -> None:
    if kind == "hang":
        time.sleep(600)
    elif kind == "die":
        os._exit(3)
    elif kind == "stop":
        os.kill(os.getppid(), signal.SIGUSR1 if PASSES_ON else signal.SIGTERM)
        time.sleep(0.5)  # until it has been passed on, for the step not to depend on it


@program
def main() -> int:
    work_dir, calls = Path(sys.argv[1]), [0]
    planned = dict(enumerate(one.split(":") for one in sys.argv[2:])).get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    more: dict[str, Any] = {"dropout": True, "report__checkpoint_every": Length(3, "steps"), "report__keep_all": True}
    cfg = toy.config(steps=8, runtime__ddp_timeout_minutes=TIMEOUT, **more)
    with toy.session(cfg.runtime), open_work_dir(work_dir, Loaded(cfg, {}, ""), "auto") as state:
        first = state["step"] if state else 0

        def happen(*_: object) -> None:
            calls[0] += 1
            if planned and planned[:2] == [str(first + calls[0]), os.environ["RANK"]]:
                accident(planned[2])

        result = toy.train(cfg, work_dir, resume=state, hook=lambda net: net.head.register_forward_pre_hook(happen))
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    sys.exit(main())
