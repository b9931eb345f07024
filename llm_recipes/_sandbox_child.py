"""What runs inside llm_recipes/sandbox.py: a script of its own, with the standard library alone.

    caller - server - tester - program

The server is started once and forks a tester for each program; it never reads a program or a test, so what it forks has
none in memory. The tester forks the process of the program before it reads anything, then reads code and tests through a
file that the caller opened. The program has two pipes to the tester and nothing else.
"""

import ast
import builtins
import contextlib
import ctypes
import errno
import importlib
import itertools
import json
import math
import operator
import os
import re
import resource
import select
import signal
import socket
import struct
import symtable
import sys
import time
import types
import typing
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from fractions import Fraction

MESSAGE = 16 * 2**20  # bytes of one value between program and tests
SCRATCH = 16 * 2**20  # bytes of the program's files
FILE = 2**20

# ---- the kernel's side ------------------------------------------------------------------------------

CLONE_THREAD, NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x10000, 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(*arguments) -> int:
    return checked(libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))


def prctl(option: int, value) -> None:
    checked(libc.prctl(option, ctypes.c_ulong(value) if isinstance(value, int) else value, *[ctypes.c_ulong(0)] * 3))


def die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        prctl(SET_PDEATHSIG, number)


def mount_scratch(folder: str) -> None:
    options = f"size={SCRATCH},nr_inodes=1024,mode=700".encode()
    nosuid_nodev_noexec = 2 | 4 | 8
    checked(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(nosuid_nodev_noexec), options))


def enter_namespaces() -> None:
    """User, network, IPC, pid, host name and mounts of its own; the pid namespace from the next fork on."""
    uid, gid = os.getuid(), os.getgid()
    checked(libc.unshare(NEWUSER | NEWNS | NEWNET | NEWIPC | NEWPID | NEWUTS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_scratch() -> None:
    """As the first process of the pid namespace: the file system is read-only from here on, but for a tmpfs at /proc, the
    one folder that exists everywhere and that nothing here needs.
    """
    # RLIMIT_NPROC does not hold for root. Before Linux 6.14 this number is not the namespace's, but that of the machine.
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 14):
        with open("/proc/sys/kernel/pid_max", "w") as file:
            file.write("364")  # the first 300 are not given out a second time
    mount_scratch("/proc")
    os.mkdir("/proc/scratch")
    read_only = struct.pack("4Q", 1, 0, 0, 0)
    mount_setattr, current_folder, recursive = 442, -100, 0x8000
    syscall(mount_setattr, current_folder, ctypes.c_char_p(b"/"), recursive, ctypes.c_char_p(read_only), len(read_only))


def readable() -> list[str]:
    """The interpreter and the C libraries, without installed packages: those hold benchmarks with their answers."""
    standard = os.path.dirname(os.__file__)
    found = ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom", "/dev/zero"]
    found += [f"{standard}/{name}" for name in os.listdir(standard) if name not in ("site-packages", "dist-packages")]
    for folder in {"/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"}:
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if ".so" in name or "-linux-" in name or name == "locale":  # as in /usr/lib/x86_64-linux-gnu
                found.append(f"{folder}/{name}")
    return found


READ_FILE, READ_DIR, WRITE_FILE = 4, 8, 2


def landlock_version() -> int:
    return syscall(444, None, 0, 1)


def landlock_rules(scratch: str) -> int:
    """A ruleset: libraries to read, /dev/null to write, everything but execution below `scratch`."""
    version = landlock_version()
    execute, refer, truncate, ioctl = 1, 1 << 13, 1 << 14, 1 << 15
    everything = 0x1FFF | (version >= 2) * refer | (version >= 3) * truncate | (version >= 5) * ioctl
    # handled: files; TCP (version 4); signals and abstract sockets to outside (version 6)
    attributes = struct.pack("3Q", everything, (version >= 4) * 3, (version >= 6) * 3)
    rules = syscall(444, ctypes.c_char_p(attributes), len(attributes), 0)
    allowed = [(path, READ_FILE | READ_DIR) for path in readable()]
    allowed += [("/dev/null", READ_FILE | WRITE_FILE), (scratch, everything & ~execute)]
    for path, rights in allowed:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights &= ~0 if os.path.isdir(path) else READ_FILE | WRITE_FILE
        syscall(445, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, fd)), 0)
        os.close(fd)
    return rules


# What a program may ask of the kernel: (name, number on x86_64, number on aarch64). All else is "not implemented", so that
# the C library falls back where it can. Nothing here starts a program, opens a connection, changes the owner, the mode or
# the times of a file, or names another process.
TABLE = """
read 0 63 write 1 64 close 3 57 stat 4 - fstat 5 80 lstat 6 - poll 7 - lseek 8 62 mmap 9 222 mprotect 10 226
munmap 11 215 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 pread64 17 67 pwrite64 18 68
readv 19 65 writev 20 66 access 21 - pipe 22 - select 23 - sched_yield 24 124 mremap 25 216 madvise 28 233 dup 32 23
dup2 33 - pause 34 - nanosleep 35 101 getitimer 36 102 alarm 37 - setitimer 38 103 getpid 39 172 sendfile 40 71
exit 60 93 uname 63 160 fsync 74 82 fdatasync 75 83 ftruncate 77 46 getcwd 79 17 chdir 80 49
fchdir 81 50 rename 82 - mkdir 83 - rmdir 84 - link 86 - unlink 87 - symlink 88 - readlink 89 - umask 95 166
gettimeofday 96 169 getrlimit 97 163 getrusage 98 165 sysinfo 99 179 times 100 153 getuid 102 174 getgid 104 176
geteuid 107 175 getegid 108 177 getppid 110 173 getpgrp 111 - getgroups 115 158 sigaltstack 131 132 statfs 137 43
fstatfs 138 44 gettid 186 178 time 201 - futex 202 98 sched_getaffinity 204 123 getdents64 217 61
restart_syscall 219 128 fadvise64 221 223 clock_gettime 228 113 clock_getres 229 114 clock_nanosleep 230 115
exit_group 231 94 epoll_wait 232 - epoll_ctl 233 21 mkdirat 258 34 newfstatat 262 79 unlinkat 263 35 renameat 264 38
linkat 265 37 symlinkat 266 36 readlinkat 267 78 faccessat 269 48 pselect6 270 72 ppoll 271 73 set_robust_list 273 99
epoll_pwait 281 22 epoll_create1 291 20 dup3 292 24 pipe2 293 59 getcpu 309 168 renameat2 316 276 getrandom 318 278
membarrier 324 283 copy_file_range 326 285 statx 332 291 rseq 334 293 close_range 436 436 faccessat2 439 439
"""
SYSCALLS = TABLE.split()
# Commands of fcntl: DUPFD, GETFD, SETFD, GETFL, locks of records (5 to 7 and 36 to 38), DUPFD_CLOEXEC. Those left out have
# another process sent a signal or hold a lease on a file of others.
SETFL, FCNTL = 4, (0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030)
MACHINES = {  # column, AUDIT_ARCH of the kernel, numbers of open, openat, clone, prlimit64, ioctl, fcntl
    "x86_64": (1, 0xC000003E, (2, 257, 56, 302, 16, 72)),
    "aarch64": (2, 0xC00000B7, (None, 56, 220, 261, 29, 25)),
}


def seccomp_filter(machine: str) -> bytes:
    """A BPF program over `struct seccomp_data` (seccomp(2)): allow what is in SYSCALLS, and some calls by an argument."""
    column, architecture, (open_, openat, clone, prlimit, ioctl, fcntl) = MACHINES[machine]
    load, equal, at_least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
    kill, allow, missing = 0x80000000, 0x7FFF0000, 0x00050000 | errno.ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the numbers of x32
        lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    whole = 2**32 - 1
    emptying = os.O_TRUNC | os.O_ACCMODE, os.O_TRUNC  # a file opened for reading: Landlock 3 forbids it too
    for verdict, number, *conditions in (  # of a condition: argument, bits, value
        (missing, open_, (1, *emptying)), (missing, openat, (2, *emptying)), (allow, open_), (allow, openat),
        (allow, clone, (0, CLONE_THREAD, CLONE_THREAD)), (allow, prlimit, (0, whole, 0)),  # of the caller itself
        *((allow, ioctl, (1, whole, request)) for request in (0x5450, 0x5451)),  # to keep a descriptor over exec
        *((allow, fcntl, (1, whole, command)) for command in FCNTL),
        (allow, fcntl, (1, whole, SETFL), (2, os.O_ASYNC, 0)),
    ):  # fmt: skip
        if number is not None:
            left = 3 * len(conditions) + 2
            lines.append((equal, 0, left, number))
            for argument, bits, value in conditions:
                left -= 3
                lines += [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits), (equal, 0, left - 1, value)]
            lines += [(give, 0, 0, verdict), (load, 0, 0, 0)]
    for number in SYSCALLS[column::3]:
        if number != "-":
            lines += [(equal, 0, 1, int(number)), (give, 0, 0, allow)]
    lines.append((give, 0, 0, missing))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def seccomp() -> None:
    code = seccomp_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    filter_mode = 2
    checked(libc.prctl(SET_SECCOMP, ctypes.c_ulong(filter_mode), ctypes.c_char_p(program)))


def limit(cpu_seconds: float, memory_mb: int, own_user: bool) -> None:
    memory = memory_mb * 2**20
    limits = {
        "CPU": math.ceil(cpu_seconds), "AS": memory, "DATA": memory, "FSIZE": FILE, "NOFILE": 64, "CORE": 0,
        "MSGQUEUE": 0, "MEMLOCK": 0,
    }  # fmt: skip
    if own_user:  # elsewhere all processes of this user count
        limits["NPROC"] = 64
    for name, value in limits.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def seal(layers: list[str], rules: int | None) -> None:
    """No new rights, no capabilities, Landlock, seccomp; from here on for good."""
    if sys.platform != "linux":
        return
    prctl(SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        syscall(446, rules, 0)
        os.close(rules)
    version_3, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    checked(libc.capset(ctypes.c_char_p(version_3), ctypes.c_char_p(none)))
    prctl(SET_DUMPABLE, 0)
    if "seccomp" in layers:
        seccomp()


# ---- which layers work here -------------------------------------------------------------------------


def works(attempt, *arguments) -> bool:
    """Tries it in a process of its own."""
    pid = os.fork()
    if not pid:
        try:
            attempt(*arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def refused(action, *arguments) -> None:
    try:
        action(*arguments)
    except OSError:
        return
    raise AssertionError(action)


def try_namespaces() -> None:
    enter_namespaces()
    assert works(lambda: (enter_scratch(), pair_namespaces(), refused(os.mkdir, "/proc/other"), refused(os.rmdir, "/")))


def try_landlock() -> None:
    seal(["landlock"], landlock_rules("/dev"))
    refused(os.listdir, "/")


def try_seccomp() -> None:
    seal(["seccomp"], None)
    refused(socket.socket)
    refused(os.fork)


def find_layers() -> list[str]:
    layers = ["rlimits"] if works(limit, 1, 512, False) else []
    if works(try_namespaces):
        layers.append("namespaces")
    if works(try_landlock):
        layers.append(f"landlock-{landlock_version()}")
    if works(try_seccomp):
        layers.append("seccomp")
    return layers


# ---- values between the tests and the program -------------------------------------------------------


SEQUENCES = {  # type, and how to make one of its items
    "l": (list, list), "t": (tuple, tuple), "s": (set, set), "f": (frozenset, frozenset),
    "keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "items": (type({}.items()), lambda items: dict(items).items()),
}  # fmt: skip
SCALARS = {  # type, its parts in JSON, and how to make one of them
    "b": (bytes, lambda v: [v.decode("latin-1")], lambda text: text.encode("latin-1")),
    "bytearray": (bytearray, lambda v: [v.decode("latin-1")], lambda text: bytearray(text.encode("latin-1"))),
    "complex": (complex, lambda v: [v.real, v.imag], complex),
    "Decimal": (Decimal, lambda v: [str(v)], Decimal),
    "Fraction": (Fraction, lambda v: [hex(v.numerator), hex(v.denominator)], lambda *v: Fraction(*map(from_hex, v))),
    "range": (range, lambda v: [hex(v.start), hex(v.stop), hex(v.step)], lambda *v: range(*map(from_hex, v))),
    "slice": (slice, lambda v: [v.start, v.stop, v.step], slice),
    "datetime": (datetime, lambda v: [v.isoformat()], datetime.fromisoformat),  # before date, from which it derives
    "date": (date, lambda v: [v.isoformat()], date.fromisoformat),
    "time": (time_of_day, lambda v: [v.isoformat()], time_of_day.fromisoformat),
    "timedelta": (timedelta, lambda v: [v.days, v.seconds, v.microseconds], timedelta),
}


def from_hex(text: str) -> int:
    return int(text, 16)


def encode(value, reference):
    """JSON of plain values, exact or derived from plain types; `reference(value)` is the number of what is not plain."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else ["i", hex(value)]
    for letter, (kind, _) in SEQUENCES.items():
        if isinstance(value, kind):
            return [letter, *[encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["d", *[[encode(k, reference), encode(v, reference)] for k, v in value.items()]]
    for letter, (kind, parts, _) in SCALARS.items():
        if isinstance(value, kind):
            return [letter, *parts(value)]
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return ["T", value.__name__]
    return ["r", reference(value)]


def builtin_type(name: str) -> type:
    if not isinstance(kind := vars(builtins)[name], type):
        raise TypeError(name)
    return kind


def decode(value, dereference):
    """Whatever the JSON says, what is made of it has the exact types of `encode`."""
    if not isinstance(value, list):
        return value
    letter, *rest = value
    if letter in SEQUENCES:
        return SEQUENCES[letter][1](decode(item, dereference) for item in rest)
    if letter == "d":
        return {decode(k, dereference): decode(v, dereference) for k, v in rest}
    if letter in SCALARS:
        return SCALARS[letter][2](*rest)
    return {"i": from_hex, "r": dereference, "T": builtin_type}[letter](*rest)


def packed(message) -> bytes:
    """A line of JSON. Written with escapes, two surrogates would come back as one character."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


# ---- the process of the program ---------------------------------------------------------------------


def run_program(inbox: int, outbox: int) -> typing.NoReturn:
    """Runs what the tester asks for, and answers with values or exceptions."""
    module = types.ModuleType("program")
    objects, numbers = [], {}

    def reference(value) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    def run(code: str) -> None:
        sys.modules["program"] = module
        exec(compile(code, "program", "exec"), vars(module))  # noqa: S102

    operations = {
        "run": run, "name": lambda name: vars(module)[name], "call": lambda f, *args, **keywords: f(*args, **keywords),
        "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem, "iter": iter,
        "next": next, "len": len, "bool": bool, "contains": operator.contains, "str": str, "repr": repr,
    }  # fmt: skip
    with open(inbox, "rb") as requests, open(outbox, "wb") as answers:
        answers.write(b"ready\n")
        answers.flush()
        for line in requests:
            try:
                operation, arguments, keywords = decode(json.loads(line), objects.__getitem__)
                answer = packed(["value", encode(operations[operation](*arguments, **keywords), reference)])
            except BaseException as error:
                kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
                answer = packed(["raise", kind, encode(error.args, reference)])
            answers.write(answer)
            answers.flush()
    os._exit(0)


# ---- the process of the tests -----------------------------------------------------------------------


class Remote:
    """Something of the program's that is no plain value: it equals itself alone."""

    def __init__(self, ask, number: int):
        # names that no object of a program has
        object.__setattr__(self, "remote_ask", ask)
        object.__setattr__(self, "remote_number", number)

    def __eq__(self, other):
        return type(other) is Remote and self.remote_number == other.remote_number

    def __hash__(self):
        return hash(self.remote_number)

    def __repr__(self):
        return self.remote_ask("repr", self)

    def __str__(self):
        return self.remote_ask("str", self)

    def __call__(self, *args, **keywords):
        return self.remote_ask("call", self, *args, **keywords)

    def __getattr__(self, name):
        if name.startswith("__"):  # Python's own questions, as those of copy
            raise AttributeError(name)
        return self.remote_ask("getattr", self, name)

    def __setattr__(self, name, value):
        self.remote_ask("setattr", self, name, value)

    def __getitem__(self, key):
        return self.remote_ask("getitem", self, key)

    def __setitem__(self, key, value):
        self.remote_ask("setitem", self, key, value)

    def __iter__(self):
        return self.remote_ask("iter", self)

    def __next__(self):
        return self.remote_ask("next", self)

    def __contains__(self, value):
        return self.remote_ask("contains", self, value)

    def __len__(self):
        return self.remote_ask("len", self)

    def __bool__(self):
        return self.remote_ask("bool", self)


def run_tests(task: dict, answers, requests, finish) -> typing.NoReturn:
    """Ends in `finish(status, detail)`; no exception that the tests might catch stands for the end of the program."""

    def reference(value) -> int:
        if type(value) is Remote:
            return value.remote_number
        raise TypeError(f"the tests hand a {type(value).__name__} to the program: only plain values can go there")

    def ask(operation, *arguments, **keywords):
        try:
            requests.write(packed(encode((operation, arguments, keywords), reference)))
            requests.flush()
            line = answers.readline(MESSAGE)
        except BrokenPipeError:
            line = b""
        if not line:
            finish("gone", "")
        try:
            answer, *rest = json.loads(line)
            if answer == "value":
                return decode(*rest, lambda number: Remote(ask, number))
            name, values = rest
            if not issubclass(kind := builtin_type(name), BaseException):
                raise TypeError(name)
            values = decode(values, lambda number: Remote(ask, number))
            try:
                raised = kind(*values)
            except Exception:  # a class of the program's own that wants other arguments
                raised = kind.__new__(kind)
                raised.args = values
            if kind is StopIteration and operation != "next":  # would end a map of the tests as if all were well
                raised = RuntimeError("the program raised StopIteration")
        except Exception as error:
            what = "more than 16 MiB" if len(line) >= MESSAGE else "what is no value"
            finish("failed", f"the program answered {what} ({type(error).__name__})")
        raise raised

    try:
        space = {"__name__": "tests"}
        exec(compile(task["setup"], "setup", "exec"), space)  # noqa: S102
        ask("run", task["code"])
        used = foreign(task["tests"]) - {*space}
        names = under_test(task["tests"], used) if task["names"] is None else set(task["names"])
        modules = used & sys.stdlib_module_names
        space |= {name: importlib.import_module(name) for name in modules - names}
        for name in names:
            try:
                space[name] = ask("name", name)
            except KeyError:
                space.pop(name, None)  # the tests will say which
                if task["names"] is None and name in modules:
                    space[name] = importlib.import_module(name)
        exec(compile(task["tests"], "tests", "exec"), space)  # noqa: S102
    except BaseException as error:
        finish("memory" if isinstance(error, MemoryError) else "failed", last_line(error))
    finish("passed", "")


def foreign(code: str) -> set[str]:
    """Global names that the code uses and does not bind."""
    tables = [symtable.symtable(code, "tests", "exec")]
    for table in tables:
        tables += table.get_children()
    symbols = [symbol for table in tables for symbol in table.get_symbols() if symbol.is_global()]
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return {symbol.get_name() for symbol in symbols if symbol.is_referenced()} - bound


def under_test(tests: str, used: set[str]) -> set[str]:
    """Which of the used names the program may define (see Program). The tests alone decide, never the program."""
    nodes = list(ast.walk(ast.parse(tests)))
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    alone = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in owners}
    helpers = used & vars(builtins).keys() | (used & sys.stdlib_module_names) - alone
    kinds = {name: vars(builtins).get(name) for name in helpers}
    errors = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    return helpers - errors if used == helpers and len(helpers - errors) == 1 else used - helpers


def last_line(error: BaseException) -> str:
    """Not by way of traceback, which fails on errors with odd attributes; they come from the program."""
    text = name = type(error).__name__
    with contextlib.suppress(BaseException):
        text = f"{name}: {error}".strip().removesuffix(":")
    return "".join(filter(str.isprintable, text.splitlines()[-1])) or name


def pair_namespaces() -> None:
    checked(libc.unshare(NEWPID | NEWNS | NEWIPC))
    mount_scratch("/proc/scratch")


def close_all_but(*keep: int | None) -> None:
    edges = [2, *sorted(fd for fd in keep if fd is not None), 4096]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)


def run_pair(task: int, report: int, settings: dict, layers: list[str], rules: int | None, scratch: str):
    """The tester, which first forks the program. `report` takes the program's pid, then the verdict."""

    def finish(status: str, detail: str) -> typing.NoReturn:
        os.write(report, json.dumps([status, detail[:200]]).encode() + b"\n")
        os._exit(0)

    ready = False
    try:
        namespaces = "namespaces" in layers
        limits = settings["cpu_seconds"], settings["memory_mb"], namespaces
        die_with_parent(signal.SIGKILL)
        close_all_but(task, report, rules)
        if namespaces:
            pair_namespaces()
        requests_read, requests_write = os.pipe()
        answers_read, answers_write = os.pipe()
        pid = os.fork()
        if not pid:
            close_all_but(requests_read, answers_write, rules)
            try:
                die_with_parent(signal.SIGKILL)
                os.setsid()
                os.chdir(scratch)
                os.environ |= {"HOME": scratch, "TMPDIR": scratch}
                limit(*limits)
                seal(layers, rules)
            except BaseException:
                os._exit(1)
            run_program(requests_read, answers_write)
        os.write(report, b"%d\n" % pid)
        close_all_but(task, report, rules, requests_write, answers_read)
        limit(*limits)
        seal(layers, rules)
        with open(answers_read, "rb") as answers, open(requests_write, "wb") as requests:
            if not (ready := answers.readline(MESSAGE) == b"ready\n"):
                finish("broken", "the process of the program could not be sealed")
            with open(task, "rb") as file:
                run_tests(json.load(file), answers, requests, finish)
    except BaseException as error:  # from here on of this program alone
        finish("crashed" if ready else "broken", last_line(error))
    finally:
        os._exit(1)


# ---- the server -------------------------------------------------------------------------------------


def judge(task: int, control: socket.socket, settings: dict, *arguments) -> list[str]:
    """[status, detail] of one program. Whatever happens, both of its processes are gone when this returns."""
    report, told = os.pipe()
    tester = os.fork()
    if not tester:
        run_pair(task, told, settings, *arguments)
    os.close(task)
    os.close(told)
    said, deadline, ended = b"", time.monotonic() + settings["wall_seconds"], {}
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([report, control], [], [], left)
            if control in ready:  # the caller is gone: it sends nothing while it waits
                sys.exit()
            if ready:
                said += (chunk := os.read(report, 4096))
                if not chunk:
                    break
    finally:
        os.close(report)
        messages = [json.loads(line) for line in said.split(b"\n")[:-1]]
        pids = [tester, *(message for message in messages if isinstance(message, int))]
        # -1 is all in this namespace but its first process; -pid is the group of the program
        for pid in [-1] if os.getpid() == 1 else [*pids, *(-pid for pid in pids[1:])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                ended[pid] = os.wait4(pid, 0)[1:]
    verdict = next((message for message in messages if isinstance(message, list)), None)
    if verdict and verdict[0] != "gone":
        return verdict
    if left <= 0:
        return ["timeout", f"{settings['wall_seconds']:g} s"]
    for status, usage in ended.values():
        # the kernel's limit counts ticks, usage is exact: under load one is well off the other
        if os.WIFSIGNALED(status) and usage.ru_utime + usage.ru_stime > settings["cpu_seconds"] / 2:
            return ["timeout", f"{settings['cpu_seconds']:g} s of CPU time"]
    code = os.waitstatus_to_exitcode(ended[pids[-1]][0]) if pids[-1] in ended else "unknown"
    return ["crashed", f"the {'program' if verdict else 'process of the tests'} is gone (exit code {code})"]


def serve(control: socket.socket, settings: dict, layers: list[str]) -> None:
    namespaces = "namespaces" in layers
    if namespaces:
        enter_scratch()
        folder = "/proc"
    else:
        folder = f"/tmp/sandbox-{os.urandom(8).hex()}"
        os.mkdir(folder, 0o700)
        if sys.platform == "linux":
            prctl(SET_CHILD_SUBREAPER, 1)
    try:
        scratch = f"{folder}/scratch"
        rules = landlock_rules(folder) if any(layer.startswith("landlock") for layer in layers) else None
        control.sendall(json.dumps(layers).encode() + b"\n")
        while task := socket.recv_fds(control, 1, 1)[1]:
            if not namespaces:
                os.mkdir(scratch, 0o700)
            verdict = judge(*task, control, settings, layers, rules, scratch)
            if not namespaces:
                remove(scratch)
            control.sendall(json.dumps(verdict).encode() + b"\n")
    finally:
        if not namespaces:
            remove(folder)


def remove(folder: str) -> None:
    # not shutil.rmtree, which recurses: a program chose the depth
    os.spawnvp(os.P_WAIT, "rm", ["rm", "-rf", folder])  # noqa: S606


def main() -> None:
    settings, control = json.loads(sys.argv[1]), socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    layers = find_layers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if "namespaces" in layers:
        die_with_parent(signal.SIGKILL)
        enter_namespaces()
        if pid := os.fork():
            os.waitpid(pid, 0)
            return
    die_with_parent(signal.SIGTERM)  # a process of its own namespace leaves nothing; the others have to clear up
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    serve(control, settings, layers)


if __name__ == "__main__":
    main()
