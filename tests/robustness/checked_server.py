"""The server's own main, with scheduler and prefix cache checked at every rest and at its end.

Run by `tests.robustness.soak` as `python -X dev -m tests.robustness.checked_server`. A failed check
ends the server with a traceback on stderr; the number of checks is its last line.
"""

import gc
import os
import sys

from mlxlite.__main__ import main
from mlxlite.engine.engine import Engine


def checked_main() -> None:
    idle, leave, engines, num_checks = Engine._idle, os._exit, set[Engine](), 0

    def check(engine: Engine) -> None:
        nonlocal num_checks
        engine._scheduler.check()
        num_checks += 1
        print(f"rest: {len(gc.get_objects())} objects", file=sys.stderr)

    async def checked_idle(self: Engine) -> None:
        engines.add(self)
        check(self)
        await idle(self)

    def checked_exit(code: int) -> None:
        for engine in engines:
            check(engine)
        gc.collect()  # logs what is unclosed
        os.write(2, f"check: clean, {num_checks} times\n".encode())  # sys.stderr's thread would end
        leave(code)

    Engine._idle = checked_idle  # type: ignore[method-assign]
    os._exit = checked_exit  # type: ignore[assignment]
    main()


if __name__ == "__main__":
    checked_main()
