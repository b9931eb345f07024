"""Runs programs that a model wrote and says whether they pass their tests.

A program and its tests are two processes that share nothing but a pipe for plain values: numbers, strings, bytes, lists,
tuples, dicts and sets. The program never sees a test, an expected value or the verdict. What it returns is rebuilt from
exact built-in types, so neither a value that claims to equal everything nor a walk through the interpreter's frames
passes. Plain are also Decimal, Fraction, range, dates and times, and the views of a dict. What is no plain value stays
with the program; the tests hold a handle that equals nothing but itself, and the program answers for its length, its truth,
its text and what is `in` it.

Arguments are copies: what a function does to its arguments does not reach the tests. A program has the standard library,
no installed package, no asyncio (which needs sockets), and a folder that is gone afterwards. What it can still learn of
the machine are the names, sizes and dates of files whose path it guesses.
"""

import contextlib
import functools
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llm_recipes.errors import UserError

LAYERS = ("rlimits", "namespaces", "landlock", "seccomp")
CHILD = Path(__file__).with_name("_sandbox_child.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}  # sets in the same order every time


@dataclass(frozen=True)
class Program:
    """Code and what is to become of it.

    `names`: what the tests take from the program, best said where it is known. Without it, all names that the tests use
    and that neither they nor `setup` define, but for helpers: built-ins, and modules of the standard library of which they
    use attributes alone (`math.isclose`). Helpers are the real ones whatever the program defines, unless the tests use one
    helper and nothing else, errors apart: then that must be what is tested (`assert sum(2, 3) == 6`). A module's name used
    in any other way (`statistics(3)`) is the program's. What the program does not define is Python's own.
    """

    code: str  # written by a model
    tests: str  # trusted: raises when the program is wrong
    setup: str = ""  # trusted: run beside the tests before `names` are bound
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    status: str  # passed, failed, timeout, memory, crashed
    detail: str  # the last line of the error, at most 200 characters; "" when passed


class _Server:
    """A process that judges one program after another (see _sandbox_child.py)."""

    def __init__(self, **settings):
        self.socket, other = socket.socketpair()
        # As `python -I`, but for the seed of hashes. The environment is ours.
        command = [sys.executable, "-P", "-s", "-S", "-B"]
        with other:
            self.process = subprocess.Popen(
                [*command, str(CHILD), json.dumps(settings)], stdin=other, stdout=subprocess.DEVNULL, env=ENVIRONMENT,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        self.answers, self.index = self.socket.makefile("r"), None

    def give(self, index: int, program: Program) -> None:
        """The program goes by a file of its own, which the server hands on unread."""
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(asdict(program)).encode())
            file.seek(0)
            socket.send_fds(self.socket, [b"!"], [file.fileno()])
        self.index = index

    def answer(self) -> list[str]:
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the sandbox's server ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answers.close()
        self.socket.close()
        self.process.wait()


@functools.cache
def layers() -> tuple[str, ...]:
    """The layers of isolation that work on this machine, each of them tried: rlimits, namespaces, landlock-N, seccomp."""
    with _Server(cpu_seconds=1, wall_seconds=1, memory_mb=512) as server:
        return tuple(server.answer())


def require(strict: bool) -> tuple[str, ...]:
    """The layers. Raises UserError with `strict` if one is missing."""
    return _checked(layers(), strict)


def _checked(found: Sequence[str], strict: bool) -> tuple[str, ...]:
    missing = [layer for layer in LAYERS if not any(name.split("-")[0] == layer for name in found)]
    if strict and missing:
        raise UserError(
            f"sandbox: no {', no '.join(missing)} on this machine, so programs of a model could do harm. Needed: Linux 5.13 "
            "or newer and user namespaces (Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined; "
            "Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0), or a strict sandbox turned off"
        )
    return tuple(found)


def judge(
    programs: Sequence[Program], *, cpu_seconds: float = 3, wall_seconds: float = 10, memory_mb: int = 512,
    workers: int | None = None, strict: bool = True,
) -> list[Verdict]:  # fmt: skip
    """One verdict a program, in order; `workers` at a time (default: as many as cores).

    CPU time (rounded up to whole seconds) and memory are limits of each of a program's two processes; MB are 2**20 bytes.
    Raises UserError with `strict` where a layer of isolation is missing, RuntimeError if the sandbox itself fails.
    """
    verdicts: list[Verdict | None] = [None] * len(programs)
    todo = iter(enumerate(programs))
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as servers:
        for _ in range(min(workers or os.cpu_count() or 1, len(programs))):
            server = _Server(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb)
            servers.enter_context(server)
            selector.register(server.socket, selectors.EVENT_READ, server)
        while selector.get_map():
            for key, _ in selector.select():
                server = key.data
                if server.index is None:
                    _checked(server.answer(), strict)
                else:
                    status, detail = server.answer()
                    if status == "broken":
                        raise RuntimeError(f"the sandbox could not be set up: {detail}")
                    verdicts[server.index] = Verdict(status == "passed", status, detail)
                if (following := next(todo, None)) is None:
                    selector.unregister(server.socket)
                else:
                    server.give(*following)
    return verdicts
