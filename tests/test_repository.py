"""What README and CONTRIBUTING promise about the tree itself."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_recipes.config import load_yaml
from tests.running import ROOT, run, write_texts

README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").rglob("run.py"))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]
SMALL = {
    "--max_steps": "2", "--warmup_steps": "0", "--eval_strategy": "no", "--tokenizer_vocab_size": "300",
    "--datasets": "[{path: texts.jsonl}]", "--output_dir": "out",
}  # fmt: skip


def test_readme_commands_are_those_tested_here():
    words = {shlex.split(line)[0] for line in COMMANDS}
    assert words == {"accelerate", "python", "make", "cp"} and len(COMMANDS) == 16


CHAIN = [command for command in COMMANDS if re.fullmatch(r"python recipes/[\w/]+/run.py", command)]
EVAL = [command for command in COMMANDS if command.startswith("python eval/")]


def test_the_chain_of_the_readme_runs_without_arguments(tmp_path, monkeypatch):
    """Each stage finds the one before it. Only sizes are changed: two steps on few rows."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "recipes", "recipes")
    views = {"sft": "sft", "rlhf/reward": "preference", "rlhf/ppo": "prompts", "dpo": "preference"}
    assert [Path(command.split()[1]).parent.as_posix().removeprefix("recipes/") for command in CHAIN] == [
        "pretrain",
        *views,
    ]
    for stage in ("sft", "dpo"):
        early = run(script=Path(f"recipes/{stage}/run.py").absolute())
        missing = load_yaml(ROOT / f"recipes/{stage}/config.yaml")[0]["model_name_or_path"]
        assert (
            early.code == 2 and f"{missing} does not exist: run recipes/{Path(missing).name}/run.py first" in early.err
        )
    for command in CHAIN:
        stage = Path(command.split()[1]).parent.as_posix().removeprefix("recipes/")
        view = {"path": f"builtin:arithmetic/{views.get(stage, 'pretrain')}", "rows": 64}
        if stage not in views:
            small = {
                "datasets": [view | {"rows": 2000}],
                "max_steps": 2,
                "eval_strategy": "no",
                "tokenizer_vocab_size": 600,
            }
        else:
            small = {"datasets": [view], "eval_datasets": [view | {"split": "test"}]}
            small |= (
                {"score_samples": 4}
                if stage == "rlhf/reward"
                else {"answers": {"path": "builtin:arithmetic/test", "rows": 4}}
            )
        small |= {"warmup_steps": 0} | ({"max_steps": 2, "global_batch_size": 32} if stage == "rlhf/ppo" else {})
        words = [word for key, value in small.items() for word in (f"--{key}", json.dumps(value))]
        done = run(*words, script=Path(command.split()[1]).absolute())
        assert done.code == 0, done.err
    assert {p.name for p in Path("outputs").iterdir()} == {"pretrain", "sft", "reward", "ppo", "dpo"}
    for command in EVAL:
        _, script, *words = shlex.split(command)
        done = run(*words, *(["--limit", 4] if script.endswith("run.py") else []), script=ROOT / script)
        assert done.code == 0, done.err
    assert "| arithmetic_chat (first 4) | exact_match_strict |" in done.out


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith(("python", "accelerate")) and (c not in CHAIN + EVAL or "pretrain" in c)],
)
def test_readme_command(tmp_path, monkeypatch, command):
    """As written, but for two steps on little data where the command leaves those open."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "accelerate_configs", "docs", "README.md"):
        os.symlink(ROOT / name, name)
    shutil.copytree(ROOT / "recipes/pretrain", "my_pretrain")
    write_texts(Path("texts.jsonl"), rows=3000)
    words = shlex.split(command)
    words += [word for key, value in SMALL.items() if key not in words for word in (key, value)]
    if words[0] == "python":
        done = run(*words[2:], script=Path(words[1]).absolute())
        assert done.code == 0, done.err
    else:
        words[0] = str(Path(sys.executable).parent / "accelerate")
        env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "--dry_run" in words or any(Path().rglob("metrics.json"))


def test_make_targets_and_ci():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}: install\n" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text() and os.access(ROOT / ".ci/run", os.X_OK)


def test_files_named_in_the_docs_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists() or link == "loss.png", (
                f"{page.name}: {link}"
            )
    tests = "".join(p.read_text() for p in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "docs/checkpoints.md").read_text()):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_recipes_are_templates(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 120
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)] == ["main"]
    assert f"| [`{path.parent.relative_to(ROOT)}/`]" in README and (path.parent / "config.yaml").is_file()


def test_imports_go_down_only():
    imports = {}
    for path in ROOT.glob("llm_recipes/**/*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_recipes"):
                at = ROOT / node.module.replace(".", "/")
                inside = {at / f"{alias.name}.py" for alias in node.names}
                inside = {file if file.is_file() else at / "__init__.py" for file in inside}
                names |= inside if at.is_dir() else {at.with_suffix(".py")}
            assert not (
                isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("recipes", "eval", "tests")
            )
        imports[path] = names
    order = []
    while len(order) < len(imports):
        ready = [name for name, needs in imports.items() if name not in order and needs <= set(order)]
        assert ready, f"circle among {set(imports) - set(order)}"
        order += ready


def test_requirements_are_exact_pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ." and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines[:-1])
    import importlib.metadata

    for line in lines[:-1]:
        name, version = line.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version, line
