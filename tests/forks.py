"""A process that has imported everything and forks children, which it ends at a given instant; and how to talk to it.

What a child does begins at once, so that the instant is one of its work and not of the imports.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

#: What a child that is ended by SIGKILL leaves as its exit status.
KILLED = -9


class Forks:
    """The process, seen from a test."""

    def __init__(self, *modules: ModuleType) -> None:
        """Start it with these modules from where they have been imported from."""
        places = os.pathsep.join(str(pathlib.Path(module.__file__).parents[1]) for module in modules)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places},
            text=True,
        )
        self._answer()

    def start(self, **job: Any) -> int:
        """Start a child with a job of `work` and return its process number."""
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        return self._answer()["pid"]

    def end(self) -> tuple[int, float]:
        """Exit status of the child, negative for a signal, and the seconds that it took."""
        answer = self._answer()
        return answer["status"], answer["seconds"]

    def run(self, **job: Any) -> tuple[int, float]:
        """Start a child and wait for its end."""
        self.start(**job)
        return self.end()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Fork a child for each job that comes in, kill it when the job says so, and report its end."""
    import torch

    import comq_np.cli
    import comq_torch  # noqa: F401

    torch.set_num_threads(1)
    comq_np.solve([[1.0, 2.0], [0.5, 1.0]], [[2.0, 1.0], [1.0, 2.0]], threads=1)
    answer({})
    for line in sys.stdin:
        job, started = json.loads(line), time.perf_counter()
        child = os.fork()
        if not child:
            work(job)
        answer({"pid": child})
        if job.get("kill_after") is not None:
            time.sleep(max(job["kill_after"] - (time.perf_counter() - started), 0))
            os.kill(child, signal.SIGKILL)  # it may be over, but its number is its own until we wait for it
        _, status = os.waitpid(child, 0)
        answer({"status": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started})


def answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def work(job: dict[str, Any]) -> None:
    """Do a job and exit: a `command` line of `comq`, or Python `code`.

    `kill_at` kills before the so many'th operation on files below `folder`; `limit` is the largest size of a file;
    `user` is the number of the user who does it; `output` is a file for what is printed.
    """
    import comq_np.cli

    status = 70
    try:
        output = os.open(job.get("output", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "limit" in job:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if "user" in job:
            os.setuid(job["user"])
        if job.get("kill_at") is not None:
            kill_at(job["kill_at"], job["folder"])
        if "command" in job:
            status = comq_np.cli.main(job["command"])
        else:
            exec(job["code"], {})
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def kill_at(count: int, folder: str) -> None:
    """Have this process killed when it is about to open, move, make or remove something below a folder again."""
    left = count

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and below(arguments[0], folder):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def below(path: object, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and pathlib.Path(folder) in pathlib.Path(path).parents


if __name__ == "__main__":
    serve()
