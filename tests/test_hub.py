"""Pushing to the Hub, against a real server on localhost: what goes there, what stays, and what a failure costs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llm_recipes import outputs
from llm_recipes.errors import PushFailed
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
CANARY = "hf_canarytokenQx7Lm2Vt9Rb4"
PUBLIC = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "run.yaml", "metrics.json", "loss.png"}


@pytest.fixture
def hub():
    with FakeHub(CANARY) as server:
        yield server


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- push, in this process ---------------------------------------------------------------------


@pytest.fixture
def args(hub, tmp_path, monkeypatch):
    """The arguments of a finished run in `tmp_path/run`, logged in to `hub`."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # the environment is read at import, too early
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # else large files go to a storage of Xet
    monkeypatch.setenv("HF_TOKEN", CANARY)
    folder = tmp_path / "run"
    private = ["training_args.bin", ".lock", "checkpoint-2/optimizer.pt", "checkpoint-2/model.safetensors"]
    private += ["checkpoint-2/config.json", "checkpoint-2/complete.json", "broken-checkpoint-4/config.json"]
    for name in [*PUBLIC, *private]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"content of {name}".encode())
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    (folder / "README.md").write_text("---\ntags: [llm-recipes]\n---\n\n# run\n")
    return SimpleNamespace(
        output_dir=str(folder), hub_model_id="somebody/tiny", hub_private_repo=None, hub_revision=None
    )


def test_push_uploads_only_what_others_can_use(hub, args):
    url = outputs.push(args, message="Step 2")
    folder = Path(args.output_dir)
    assert hub.files == {"somebody/tiny": {name: (folder / name).read_bytes() for name in PUBLIC}}
    assert any(request.startswith("PUT /storage/") for request in hub.requests)  # the weights did go the LFS way
    assert hub.messages == ["Step 2"] and url.startswith(f"{hub.url}/somebody/tiny/commit/")


def test_pushing_again_commits_what_has_changed(hub, args):
    first = outputs.push(args)
    assert outputs.push(args) == first and len(hub.messages) == 1
    (Path(args.output_dir) / "metrics.json").write_text("{}")
    assert outputs.push(args) != first and len(hub.messages) == 2
    assert hub.files["somebody/tiny"]["metrics.json"] == b"{}"


def test_without_a_namespace_the_repository_is_the_users(hub, args):
    args.hub_model_id = None
    args.hub_private_repo = True
    outputs.push(args)
    assert set(hub.files) == {"somebody/run"} and hub.visibility == {"somebody/run": "private"}


@pytest.mark.parametrize("trouble", ["commit", "upload", "auth", "stopped"])
def test_a_push_that_fails_says_where_the_model_is(hub, args, trouble):
    before, hub.fail = hashes(Path(args.output_dir)), trouble
    if trouble == "stopped":
        hub.stop()
    with pytest.raises(PushFailed) as failure:
        outputs.push(args, tries=2)
    message = str(failure.value)
    assert args.output_dir in message and "somebody/tiny" in message
    assert len(message.splitlines()) == 1 and CANARY not in message
    assert hashes(Path(args.output_dir)) == before
    assert not any(hub.files.values())


def test_a_push_tries_again(hub, args, monkeypatch):
    hub.fail = "commit"
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(hub, "fail", None))  # well again after the first wait
    outputs.push(args)
    assert set(hub.files["somebody/tiny"]) == PUBLIC


# ---- whole runs, each in a process of its own --------------------------------------------------


class Run:
    """The pretraining recipe, tiny and with push_to_hub, in a folder of its own and with a Hub of its own."""

    def __init__(self, folder: Path, token: str | None = CANARY, fail: str | None = None):
        self.output, self.hub = folder / "out", FakeHub(CANARY)
        self.hub.fail = fail
        words = ["the", "quick", "brown", "fox", "jumps", "over", "one", "lazy", "dog", "seven", "wizards"]
        lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) + f" {i}." for i in range(200)]
        (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = {
            "output_dir": str(self.output), "datasets": [{"path": str(folder / "lines.jsonl")}],
            "eval_fraction": 0.1, "sequence_length": 32, "tokenizer_vocab_size": 300,
            "model_config": {"model_type": "llama", "max_position_embeddings": 64, **sizes},
            "global_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
            "save_steps": 2, "report_to": "none", "sample_prompts": [], "use_cpu": True,
            "push_to_hub": True, "hub_model_id": "somebody/tiny",
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.command = [sys.executable, "recipes/pretrain/run.py", "--config", str(folder / "config.yaml")]
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        self.env |= {"HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        self.env |= {"HF_HOME": str(folder / "hf"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        self.env |= {"HF_TOKEN": token} if token else {}
        self.start()

    def start(self) -> None:
        with self.log("out").open("w") as out, self.log("err").open("w") as err:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, stdout=out, stderr=err)

    def log(self, stream: str) -> Path:
        return self.output.with_name(f"std{stream}.txt")

    def wait(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the latest start."""
        return self.process.wait(timeout=120), self.log("out").read_text(), self.log("err").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """First starts of three runs, side by side, because most of their time is imports."""
    troubles = {"well": {}, "no commit": {"fail": "commit"}, "no token": {"token": None}}
    started = {name: Run(tmp_path_factory.mktemp("run"), **trouble) for name, trouble in troubles.items()}
    yield started
    for run in started.values():
        run.process.kill()
        run.process.wait()
        run.hub.stop()


def assert_pushed(run: Run) -> None:
    there = run.hub.files["somebody/tiny"]
    assert {"README.md", "model.safetensors", "tokenizer.json", "run.yaml", "metrics.json"} <= set(there)
    assert all((run.output / name).read_bytes() == content for name, content in there.items())
    assert not [name for name in there if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth", ".lock"))]


def test_a_run_pushes_its_model(runs):
    code, _, err = runs["well"].wait()
    assert code == 0, err
    assert_pushed(runs["well"])
    assert runs["well"].hub.messages == ["End of training"]


def test_a_run_keeps_the_token_to_itself(runs):
    run = runs["well"]
    code, out, err = run.wait()
    assert code == 0 and f"Bearer {CANARY}" in run.hub.authorizations
    assert (run.output / "checkpoint-2/training_args.bin").is_file()  # the likeliest place, so it has to be there
    files = [path for path in run.output.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in out + err


def test_a_failed_push_is_made_good_by_the_same_command(runs):
    run = runs["no commit"]
    code, _, err = run.wait()
    assert code == 3, err
    assert "to the Hub failed" in err.splitlines()[-1] and str(run.output) in err.splitlines()[-1]
    assert "Traceback" not in err
    before = hashes(run.output)
    assert {"model.safetensors", "metrics.json"} <= set(before) and run.hub.files == {"somebody/tiny": {}}
    written = (run.output / "model.safetensors").stat().st_mtime_ns

    run.hub.fail = None
    run.start()
    code, out, err = run.wait()
    assert code == 0, err
    assert_pushed(run)
    assert hashes(run.output) == before and (run.output / "model.safetensors").stat().st_mtime_ns == written
    assert "step " not in out  # no line of training


def test_without_a_token_nothing_starts(runs):
    run = runs["no token"]
    code, out, err = run.wait()
    assert code == 2, err
    assert "push_to_hub" in err and "HF_TOKEN" in err and "Traceback" not in err
    assert "step " not in out
    assert not run.output.exists() and run.hub.files == {}
