"""Programs that try to pass without being right, to get out, or to do harm; and honest ones that must pass.

Each attack answers 9 where f(3) == 9 is wanted only if its attack works (or has no other use), so none may pass.
{OUTSIDE} is a folder outside, {PORT} a TCP server on this machine, {VICTIM} a process of the same user.
"""

from llm_recipes.sandbox import Program

TESTS = "assert f(3) == 9\nassert f(2) == 4\nassert f(10) == 100"
WORKS = "\ndef f(x):\n    attack()\n    return x * x"  # right if the attack goes through


def _attack(*lines):
    return "def attack():\n" + "".join(f"    {line}\n" for line in lines) + WORKS


CHEATS = {
    "exit 0": "import sys\nsys.exit(0)",
    "_exit 0": "import os\nos._exit(0)",
    "exit 0 when called": "import sys\ndef f(x): sys.exit(0)",
    "_exit 0 when called": "import os\ndef f(x): os._exit(0)",
    "equals everything": "class A:\n def __eq__(self, o): return True\n __ne__ = lambda s, o: False\ndef f(x): return A()",
    "lying int": "class A(int):\n def __eq__(self, o): return True\n __hash__ = int.__hash__\ndef f(x): return A(0)",
    "lying str": "class A(str):\n def __eq__(self, o): return True\n __hash__ = str.__hash__\ndef f(x): return A('9')",
    "lying list": "class A(list):\n def __eq__(self, o): return True\ndef f(x): return A([9])",
    "lying float": "class A(float):\n def __eq__(self, o): return True\ndef f(x): return A(float('nan'))",
    "lying class": "class M(type):\n def __eq__(s, o): return True\n __hash__ = type.__hash__\nclass f(metaclass=M):\n"
    " def __new__(cls, x): return cls\n",
    "reflected equality": "class A(int):\n def __eq__(s, o): return True\n def __req__(s, o): return True\n"
    "def f(x): return [A(1)]",
    "AssertionError does nothing": "import builtins\nclass E(BaseException):\n def __new__(*a): import os; os._exit(0)\n"
    "builtins.AssertionError = E\ndef f(x): return 0",
    "patched builtins": "import builtins\nfor n in ('isinstance', 'compile', 'exec', 'len', 'all', 'any', 'abs'):\n"
    " setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'["passed", ""]\'\ndef f(x): return 0',
    "patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0",
    "settrace": "import sys\ndef t(frame, event, arg):\n frame.f_trace_lines = False\n return None\nsys.settrace(t)\n"
    "def f(x): return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "frame walk": "import sys\ndef f(x):\n frame = sys._getframe()\n while frame:\n"
    "  for scope in (frame.f_locals, frame.f_globals):\n   for n, v in list(scope.items()):\n"
    "    if n in ('finish', 'run_tests'): v('passed', '')\n    if isinstance(v, list): v.append('passed')\n"
    "  frame = frame.f_back\n return 0",
    "runs the tests itself": "import __main__\n__main__.run_tests = lambda *a: None\ndef f(x):\n"
    " __main__.run_tests({'setup': '', 'code': '', 'tests': '', 'names': []}, None, None, print)\n return 0",
    "garbage collector": "import gc\nfor o in gc.get_objects():\n"
    " if isinstance(o, list) and all(isinstance(x, str) for x in o):\n  o[:] = ['passed', '']\ndef f(x): return 0",
    "search of memory": "import ctypes, gc\ndef f(x):\n for o in gc.get_objects():\n"
    "  if isinstance(o, dict) and 'tests' in o and isinstance(o['tests'], str) and 'f(3)' in o['tests']: return x * x\n"
    " return 0",
    "forged messages": "import os\nfor fd in range(256):\n for m in (b'[\"passed\", \"\"]\\n', b'[\"value\", 9]\\n', b'1\\n'):\n"
    "  try: os.write(fd, m)\n  except OSError: pass\ndef f(x): return 0",
    "forged messages when called": "import os\ndef f(x):\n for fd in range(256):\n"
    '  try: os.write(fd, b\'["passed", ""]\\n\' * 3)\n  except OSError: pass\n return 0',
    "forged exceptions": "import os\ndef f(x):\n for fd in range(256):\n"
    '  try: os.write(fd, b\'["raise", "exec", ["t", "finish(chr(112), 1)"]]\\n\')\n  except OSError: pass\n return 0',
    "all descriptors closed": "import os\nos.closerange(0, 4096)\ndef f(x): return 0",
    "null on all descriptors": "import os\nn = os.open(os.devnull, os.O_RDWR)\nfor fd in range(3, 60):\n"
    " try: os.dup2(n, fd)\n except OSError: pass\ndef f(x): return 0",
    "flooded pipe": "import os\ndef f(x):\n for fd in range(3, 64):\n"
    "  try:\n   while True: os.write(fd, b'9' * 65536)\n  except OSError: pass\n return 0",
    "100 MB answer": "def f(x): return 'a' * 100_000_000",
    "deep answer": "def f(x):\n r = []\n for _ in range(100_000): r = [r]\n return r",
    "deep answer, no limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n r = []\n for _ in range(100_000): r = [r]\n"
    " return r",
    "deep message": "import os\ndef f(x):\n for fd in range(3, 64):\n"
    "  try: os.write(fd, b'[\"value\", ' + b'[' * 60000 + b'\\n')\n  except OSError: pass\n return 0",
    "cyclic answer": "def f(x):\n r = []\n r.append(r)\n return r",
    "huge repr": "class A:\n def __repr__(self): return 'x' * 10**8\ndef f(x): raise ValueError(A())",
    "error that cannot be printed": "def f(x): raise SyntaxError('bad', ('f', 1, 1, 5))",
    "error of a wide line": "def f(x): raise SyntaxError('bad', ('f', 1, 1, 'text', 1, 10**12))",
    "ends the iteration": "def f(x): raise StopIteration(9)",
    "huge error": "def f(x): raise ValueError('x' * 10**7)",
    "many lines": "def f(x): raise ValueError('passed\\n' * 10**5 + '\\x1b[2J')",
    "huge int": "def f(x): return 1 << 60_000_000",
    "overridden name": "abs = lambda x: 0\nassert_ = True\nf = lambda x: 0\n__builtins__ = {'AssertionError': Exception}",
    "lying iterator": "class A:\n def __iter__(s): return s\n def __next__(s): return 9\n def __eq__(s, o): return True\n"
    "def f(x): return A()",
    "deep recursion": "def f(x): return f(x)",
    "deep recursion, no limit": "import sys\nsys.setrecursionlimit(10**9)\ndef g(x): return [*map(g, [x])]\ndef f(x): return g(x)",
    "syntax error": "def f(x) return 9",
    "null bytes": "f = 1\0",
    "empty": "",
    "prints the verdict": "print('passed')\ndef f(x): print('passed', flush=True); return 0",
}

LIMITS = {
    "endless loop at the start": "while True: pass",
    "endless loop in C": "def f(x): return sum(iter(int, 1))",
    "catches everything": "def f(x):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass",
    "sleep": "import time\ndef f(x): time.sleep(1000)",
    "waits for input": "def f(x):\n import threading; threading.Event().wait()",
    "ignores signals": "import signal, itertools\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\ndef f(x):\n for _ in itertools.count(): pass",
    "raises its limits": "import resource\ndef f(x):\n for r in range(16):\n"
    "  try: resource.setrlimit(r, (resource.RLIM_INFINITY,) * 2)\n  except (OSError, ValueError): pass\n while True: pass",
}

ESCAPES = {
    "2 GiB": _attack("b = bytearray(2 << 30)"),
    "2 GiB in small pieces": _attack("l = []", "while len(l) < 2048: l.append(bytearray(1 << 20))"),
    "mapped memory": _attack("import mmap", "mmap.mmap(-1, 2 << 30)"),
    "fork": _attack("import os", "if not os.fork(): os._exit(0)"),
    "fork bomb": "import os\nwhile True:\n try: os.fork()\n except MemoryError: pass\n",
    "fork through ctypes": _attack(
        "import ctypes, os", "pid = ctypes.CDLL(None).fork()", "if pid == 0: os._exit(0)", "assert pid > 0"
    ),
    "clone3": _attack("import ctypes", "assert ctypes.CDLL(None).syscall(435, bytes(88), 88) >= 0"),
    "thread bomb": _attack(
        "import threading, time", "threading.stack_size(65536)",
        "for _ in range(2000): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
    ),
    "socket": _attack("import socket", "socket.create_connection(('127.0.0.1', {PORT}), 2)"),
    "any socket": _attack("import socket", "socket.socket(socket.AF_UNIX)"),
    "socket pair": _attack("import socket", "socket.socketpair()"),
    "socket through ctypes": _attack("import ctypes", "assert ctypes.CDLL(None).socket(2, 1, 0) >= 0"),
    "name service": _attack("import socket", "socket.getaddrinfo('localhost', 80)", "socket.gethostbyname('example.org')"),
    "urllib": _attack("import urllib.request", "urllib.request.urlopen('http://127.0.0.1:{PORT}/')"),
    "os.system": _attack("import os", "assert os.system('true') == 0"),
    "subprocess": _attack("import subprocess", "subprocess.run(['true'], check=True)"),
    "posix_spawn": _attack("import os", "assert os.posix_spawn('/bin/true', ['true'], {})"),
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": _attack("import multiprocessing as m", "p = m.Process(target=print)", "p.start()", "p.join()"),
    "reads /etc/passwd": _attack("open('/etc/passwd').read()"),
    "reads ~/.bashrc": _attack("open('/root/.bashrc').read()"),
    "reads outside": _attack("open('{OUTSIDE}/secret').read()"),
    "lists outside": _attack("import os", "os.listdir('{OUTSIDE}')"),
    "lists /tmp": _attack("import os", "os.listdir('/tmp')"),
    "lists /": _attack("import os", "os.listdir('/')"),
    "writes /tmp": _attack("open('/tmp/sandbox_was_here', 'w').write('x')"),
    "writes outside": _attack("open('{OUTSIDE}/sandbox_was_here', 'w').write('x')"),
    "appends outside": _attack("open('{OUTSIDE}/open', 'a').write('x')"),
    "empties outside": _attack("import os", "os.truncate('{OUTSIDE}/open', 0)"),
    "empties by opening": _attack("import os", "os.open('{OUTSIDE}/open', os.O_RDONLY | os.O_TRUNC)"),
    "removes outside": _attack("import os", "os.unlink('{OUTSIDE}/open')"),
    "renames outside": _attack("import os", "os.rename('{OUTSIDE}/open', '{OUTSIDE}/sandbox_was_here')"),
    "chmod outside": _attack("import os", "os.chmod('{OUTSIDE}/secret', 0o777)"),
    "chown outside": _attack("import os", "os.chown('{OUTSIDE}/secret', os.getuid(), os.getgid())"),
    "times outside": _attack("import os", "os.utime('{OUTSIDE}/secret', (1, 1))"),
    "attributes outside": _attack("import os", "os.setxattr('{OUTSIDE}/secret', 'user.a', b'b')"),
    "symlink out": _attack("import os", "if not os.path.islink('l'): os.symlink('{OUTSIDE}/secret', 'l')", "open('l').read()"),
    "hard link out": _attack("import os", "os.link('{OUTSIDE}/secret', 'h')"),
    "up and out": _attack("import os", "os.chdir('..')", "open('x', 'w').write('x')"),
    "writes the library": _attack("import os", "open(os.__file__, 'a').write('')"),
    "reads installed packages": _attack(
        "import os, sysconfig", "os.listdir(os.path.dirname(os.__file__) + '/site-packages')"
    ),
    "reads packages of the system": _attack(
        "import os, sys", "version = 'python%d.%d' % sys.version_info[:2]",
        "folders = [f'{r}/{p}/{n}-packages' for r in ('/usr/lib', '/usr/lib64', '/lib', '/usr/local/lib')",
        "           for p in ('python3', version) for n in ('dist', 'site')]",
        "folders += [d for r in ('/usr/lib', '/usr/lib64') for d, _, _ in os.walk(r) if d.endswith('-packages')]",
        "found = []", "for folder in folders:", "    try: found += os.listdir(folder)", "    except OSError: pass",
        "assert found",
    ),
    "reads our own code": _attack("import __main__", "open(__main__.__file__).read()"),
    "5 MB file": _attack("with open('big', 'wb') as f: f.write(bytes(5_000_000))"),
    "many files": _attack("for i in range(100): open(f'f{i}', 'wb').write(bytes(1 << 20))"),
    "many empty files": _attack("for i in range(5000): open(f'f{i}', 'wb').close()"),
    "device": _attack("import os", "os.mknod('d', 0o600 | 0o020000, os.makedev(1, 1))"),
    "/proc/self": _attack("open('/proc/self/maps').read()"),
    "/proc/self/environ": _attack("open('/proc/self/environ').read()"),
    "/proc/1/mem": _attack("open('/proc/1/mem', 'r+b')"),
    "/proc/self/fd": _attack("import os", "assert os.listdir('/proc/self/fd')"),
    "/dev/mem, /dev/shm, /dev/tty": _attack(
        "for p in ('/dev/mem', '/dev/shm/x', '/dev/tty', '/dev/kmsg', '/dev/ptmx'):", "    try: open(p, 'w')",
        "    except OSError: continue", "    return", "raise OSError",
    ),
    "environment": _attack(
        "import os", "assert set(os.environ) - {'PATH', 'LANG', 'LC_CTYPE', 'PYTHONHASHSEED', 'HOME', 'TMPDIR'}"
    ),
    "environment of the process": _attack(
        "import ctypes", "assert ctypes.CDLL(None).getenv(b'HF_TOKEN')"
    ),
    "kills its parent": _attack("import os, signal", "os.kill(os.getppid(), signal.SIGKILL)"),
    "kills all": _attack("import os, signal", "os.kill(-1, signal.SIGKILL)"),
    "kills its group": _attack("import os, signal", "os.killpg(0, signal.SIGKILL)"),
    "kills another": _attack("import os, signal", "os.kill({VICTIM}, signal.SIGKILL)"),
    "has another killed": _attack(
        "import fcntl, os", "r, w = os.pipe()", "fcntl.fcntl(r, fcntl.F_SETOWN, {VICTIM})", "fcntl.fcntl(r, 10, 9)",
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)", "os.write(w, b'x')",
    ),
    "owner of a pipe's signals": _attack("import fcntl, os", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())"),
    "owner, by a structure": _attack(
        "import fcntl, os, struct", "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, os.getpid()))"
    ),
    "signal of a pipe": _attack("import fcntl, os", "fcntl.fcntl(os.pipe()[0], 10, 9)"),
    "asynchronous pipe": _attack("import fcntl, os", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_ASYNC)"),
    "lease": _attack("import fcntl", "fcntl.fcntl(open('x', 'w'), fcntl.F_SETLEASE, fcntl.F_WRLCK)"),
    "lock on a library": _attack("import fcntl, os", "fcntl.flock(open(os.__file__), fcntl.LOCK_EX | fcntl.LOCK_NB)"),
    "limits another": _attack("import resource", "resource.prlimit({VICTIM}, resource.RLIMIT_CPU, (1, 1))"),
    "limits its parent": _attack("import os, resource", "resource.prlimit(os.getppid() or 2, resource.RLIMIT_CPU, (1, 1))"),
    "ptrace": _attack("import ctypes", "assert ctypes.CDLL(None).ptrace(16, {VICTIM}, 0, 0) == 0"),
    "process_vm_writev": _attack(
        "import ctypes", "assert ctypes.CDLL(None).process_vm_writev({VICTIM}, 0, 0, 0, 0, 0) == 0"
    ),
    "pidfd": _attack("import os", "os.pidfd_open({VICTIM})"),
    "scheduling of another": _attack("import os", "os.setpriority(os.PRIO_PROCESS, {VICTIM}, 19)"),
    "host name": _attack("import socket", "socket.sethostname('owned')"),
    "unshare": _attack("import ctypes", "assert ctypes.CDLL(None).unshare(0x10000000) == 0"),
    "mount": _attack("import ctypes", "assert ctypes.CDLL(None).mount(b'tmpfs', b'.', b'tmpfs', 0, None) == 0"),
    "chroot": _attack("import os", "os.chroot('.')"),
    "other user": _attack("import os", "os.setuid(os.getuid())"),
    "lives on after its parent": _attack("import ctypes", "assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0"),
    "keyring": _attack("import ctypes", "assert ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0"),
    "io_uring": _attack("import ctypes", "assert ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0"),
    "bpf, perf, userfaultfd": _attack(
        "import ctypes", "c = ctypes.CDLL(None)", "assert max(c.syscall(n, 0, bytes(128), 128) for n in (321, 298, 323)) >= 0"
    ),
    "shared memory": _attack("import ctypes", "assert ctypes.CDLL(None).shmget(0x5a4d, 4096, 0o1666) >= 0"),
    "memory file": _attack("import os", "os.memfd_create('x')"),
    "x32": _attack("import ctypes", "assert ctypes.CDLL(None).syscall(0x40000000 + 39) > 0"),
    "stdin": _attack("assert input()"),
}  # fmt: skip

HONEST = {
    "plain": "def f(x): return x * x",
    "standard library": "import collections, datetime, decimal, fractions, hashlib, heapq, itertools, random, re, statistics\n"
    "import string, typing, bisect, copy, dataclasses, enum, functools, zlib, csv, io, tempfile, secrets, uuid, asyncio\n"
    "hashlib.md5(b'x').hexdigest(); hashlib.sha256(b'x'); random.random(); secrets.token_hex(); uuid.uuid4()\n"
    "datetime.datetime.now()\ndef f(x): return x ** 2",
    "zone": "import zoneinfo, datetime\nzoneinfo.ZoneInfo('Europe/Paris')\ndef f(x): return x * x",
    "threads": "import threading\nfrom concurrent.futures import ThreadPoolExecutor\ndef f(x):\n"
    " with ThreadPoolExecutor(8) as pool: return sum(pool.map(lambda _: x, range(x)))",
    "files": "import os, tempfile, shutil\ndef f(x):\n os.makedirs('a/b', exist_ok=True)\n"
    " with open('a/b/c', 'w') as file: file.write(str(x * x))\n shutil.copyfile('a/b/c', 'a/d')\n os.replace('a/d', 'e')\n"
    " with tempfile.TemporaryDirectory() as t, tempfile.TemporaryFile() as g: g.write(b'x'); open(t + '/x', 'w').close()\n"
    " assert os.listdir('.') and os.path.exists('e')\n r = int(open('e').read())\n shutil.rmtree('a'); os.remove('e')\n return r",
    "descriptors and locks": "import fcntl, os\ndef f(x):\n with open('n', 'w') as file:\n  os.dup(file.fileno()); os.set_inheritable(file.fileno(), 1)\n"
    "  fcntl.lockf(file, fcntl.LOCK_EX); fcntl.lockf(file, fcntl.LOCK_UN)\n"
    "  fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_NONBLOCK)\n return x * x",
    "database": "import sqlite3\ndef f(x):\n with sqlite3.connect('base') as base:\n"
    "  base.execute('create table if not exists t (x)')\n  base.execute('insert into t values (?)', (x,))\n"
    "  return base.execute('select x * x from t order by rowid desc').fetchone()[0]",
    "recursion": "import sys\nsys.setrecursionlimit(20000)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def f(x): return g(15000) - 15000 + x * x",
    "prints a lot": "import sys\ndef f(x):\n for _ in range(200): print('x' * 100_000); print('y' * 9999, file=sys.stderr)\n"
    " return x * x",
    "numbers like any": "class A(int): pass\ndef f(x): return A(x * x)",
    "a class": "class f(int):\n def __new__(cls, x): return int.__new__(cls, x * x)",
    "not main": "if __name__ == '__main__':\n raise SystemExit(1)\ndef f(x): return x * x",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n x: int\n"
    "def f(x): return P(x).x * x",
    "alarm": "import signal\nsignal.alarm(5)\ndef f(x): return x * x",
    "surrogates": "s = '\\ud800'\ndef f(x): return x * x",
    "memory": "def f(x):\n b = bytearray(200 << 20)\n return x * x",
}


def programs(kind: dict, outside: str = "/nonexistent", port: int = 1, victim: int = 2**22) -> list[Program]:
    filled = {"{OUTSIDE}": outside, "{PORT}": str(port), "{VICTIM}": str(victim)}
    codes = []
    for code in kind.values():
        for key, value in filled.items():
            code = code.replace(key, value)
        codes.append(Program(code, TESTS))
    return codes
