"""The applications' servers, started and stopped, and loaded by turns."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.database import url
from benchmarks.rounds import Series
from benchmarks.web import APPLICATIONS, bodies, loader

CONNECTIONS = 20
SECONDS_TO_START = 30.0


def missing(name: str) -> str | None:
    """Why an application cannot be served here; None when it can."""
    needs = APPLICATIONS[name].needs
    absent = [module for module in needs if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextmanager
def serve(name: str, loop: str) -> Iterator[int]:
    """uvicorn with one worker in a process of its own; gives its port.

    Raises:
        RuntimeError: it does not answer, or not what it must; with what it has printed.
    """
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", APPLICATIONS[name].place, "--port", str(port)]
    command += ["--loop", loop, "--no-access-log", "--log-level", "warning"]
    environ = os.environ | {
        "DJANGO_SETTINGS_MODULE": "benchmarks.web.settings",
        "BENCHMARKS_SERVED": name,
        "BENCHMARKS_URL": url("postgresql+asyncpg"),
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            try:
                _wait_for(process, port)
            except Exception as error:
                process.kill()
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError("; ".join([str(error)[:200], *lines[-1:]])) from error
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            for work, path in bodies.PATHS.items():
                _, body = loader.ask(port, path)
                if json.loads(body) != bodies.expected(work):
                    raise loader.WrongAnswer(f"wrong answer: {body[:200]!r}")
            return
        except ConnectionRefusedError:
            if process.poll() is not None:
                raise
            if time.monotonic() > until:
                raise
            # It says nothing when it is ready.
            time.sleep(0.05)


def measure(
    group: Sequence[str],
    rounds: int,
    seconds: float,
    loop: str,
    say: Callable[[str], None],
) -> list[Series]:
    """Load the servers of a group by turns; a value is requests per second."""
    series = {work: Series(work, CONNECTIONS) for work in bodies.PATHS}
    with ExitStack() as servers:
        ports: dict[str, int] = {}
        for name in group:
            try:
                ports[name] = servers.enter_context(serve(name, loop))
            except RuntimeError as error:
                say(f"  {name}: {error}")
                for found in series.values():
                    found.absent[name] = str(error)
        for turn in range(rounds + 1):
            say(f"HTTP, round {turn} of {rounds}")
            for work, path in bodies.PATHS.items():
                _turn(series[work], ports, path, seconds, is_measured=turn > 0)
    return list(series.values())


def _turn(
    series: Series, ports: Mapping[str, int], path: str, seconds: float, is_measured: bool
) -> None:
    for name, port in ports.items():
        if name in series.absent:
            continue
        try:
            rate = requests_per_second(port, path, seconds)
        except RuntimeError as error:
            series.absent[name] = str(error)
            series.times.pop(name, None)
        else:
            if is_measured:
                series.times.setdefault(name, []).append(rate)


def requests_per_second(port: int, path: str, seconds: float) -> float:
    """What wrk says, where it is installed; else our own loader.

    Raises:
        RuntimeError: an answer was wrong.
    """
    if wrk := shutil.which("wrk"):
        whole = str(max(1, round(seconds)))
        where = f"http://{loader.HOST}:{port}{path}"
        command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{whole}s", where]
    else:
        arguments: list[Any] = [port, path, CONNECTIONS, seconds]
        command = [sys.executable, "-m", "benchmarks.web.loader", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode or "Non-2xx" in printed or "Socket errors" in printed:
        raise RuntimeError(printed.strip().splitlines()[-1][:300])
    if wrk:
        return float(printed.partition("Requests/sec:")[2].split()[0])
    return float(done.stdout)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((loader.HOST, 0))
        return int(listener.getsockname()[1])
