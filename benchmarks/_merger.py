"""Merges as it is told, line by line: ``python -P _merger.py LIBRARY``. Run by `merge.py` in that library's interpreter. And
``python -P _merger.py run COMMAND ...`` runs one command and says what it used.

A line on standard input is ``{"config": file, "out": folder, "options": {...}}``; the answer is a line with the seconds, the
processor's seconds and the peak of resident memory in MB of that merge, or with the ``error``. Nothing but the library's own
packages is needed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any


def merger(library: str) -> Any:
    """A function ``(config, out, **options)`` that merges as a mergekit file says."""
    if library == "polytask":
        from polytask.merge.mergekit import merge_file

        return merge_file
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def merge(config: str, out: str, **options: Any) -> None:
        with open(config, encoding="utf-8") as file:
            said = MergeConfiguration.model_validate(yaml.safe_load(file))
        run_merge(said, out, MergeOptions(quiet=True, copy_tokenizer=False, **options))

    return merge


def peak() -> float:
    """MB of resident memory at most since `forget`."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def forget() -> None:
    """Lets the peak begin anew."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def watched(command: list[str]) -> None:
    """Runs a command and answers what it used. This process is small: a child's peak counts its parent's memory at the start."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        text = child.stdout.read() if child.stdout else b""
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    said: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}
    said["peak_mb"] = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    if child.returncode:
        said["error"] = text.decode(errors="replace")[-300:]
    print(json.dumps(said))


def main() -> None:
    """Answers until standard input ends."""
    if sys.argv[1] == "run":
        watched(sys.argv[2:])
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints is no answer
    merge = merger(sys.argv[1])
    for line in sys.stdin:
        asked = json.loads(line)
        forget()
        began, busy = time.perf_counter(), time.process_time()
        try:
            merge(asked["config"], asked["out"], **asked["options"])
            said = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - busy, "peak_mb": peak()}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
