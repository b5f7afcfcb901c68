"""The process that renders chat templates (template_worker.py), and its limit of time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from llama.errors import one_line

SECONDS = 5.0  # limit for one prompt, which takes a few milliseconds
# With -S and the caller's own path, jinja2 is found as the caller finds it, and no site module runs at the start.
START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class TemplateRenderer:
    """The process that renders templates, started when it is first needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; raise ValueError for an error of the template or a lack of time or memory."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start_process()
                self._end = weakref.finalize(self, _end_process, self._process)
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            line = ""
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                pass  # the process has ended
            finally:
                timer.cancel()
                if not line.endswith("\n"):  # also after Ctrl-C: a late answer would be taken for the next one
                    self._end()
        if not line.endswith("\n"):
            raise ValueError(f"the chat template was stopped: it takes more than {SECONDS:g} s or too much memory")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(one_line(answer["error"]))
        return answer


def _start_process() -> subprocess.Popen[str]:
    """Start template_worker.py, and wait until it is ready; raise ChildProcessError where it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", START, str(Path(__file__).with_name("template_worker.py")), *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _end_process(process)
        raise ChildProcessError("the process that renders chat templates did not start: is jinja2 installed?")
    return process


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes its pipes and waits
