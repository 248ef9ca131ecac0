"""Weights of the Hub, from a stand-in of its HTTP interface on this machine."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_checkpoint

from ddo_cli import checkpoint, hub
from ddo_cli.errors import CheckpointError

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parent.parent
COMMIT = "0123456789" * 4


@pytest.fixture
def server(tmp_path):
    """Has user/name at main and v1, and nothing else."""
    content = Path(make_checkpoint(tmp_path / "m.safetensors")).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, with_body: bool) -> None:
            is_there = self.path in {f"/user/name/resolve/{name}/{hub.FILE}" for name in ("main", "v1", COMMIT)}
            self.send_response(200 if is_there else 404)
            self.send_header("Content-Length", str(len(content) if is_there else 0))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header(
                "ETag" if is_there else "X-Error-Code",
                f'"{hashlib.sha256(content).hexdigest()}"' if is_there else "RepoNotFound",
            )
            self.end_headers()
            if with_body and is_there:
                self.wfile.write(content)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


@pytest.mark.slow
def test_a_model_is_fetched_and_used(server, tmp_path):
    """In a process of its own, since the library reads its address once."""
    environment = {
        "HF_ENDPOINT": server,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    environment |= {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def run(ckpt: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ddo_cli", "sample", "--ckpt", ckpt, "--num-images", "1", "--json"]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("hf://user/name@v1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint_sha256"] == checkpoint.load(tmp_path / "m.safetensors").sha256
    refused = run("hf://user/other")
    assert refused.returncode == 2
    assert "hf://user/other: model.safetensors cannot be fetched" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["hf://user", "hf://user/name/file", "hf://user/name@", "hf:///name"])
def test_names_that_are_no_repository(name):
    with pytest.raises(CheckpointError, match="write hf://user/name"):
        checkpoint.resolve(name)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ddo-cli\[hub\]'"):
        checkpoint.resolve("hf://user/name")


def test_only_weights_are_fetched(ddo):
    assert "is not fetched" in ddo("finetune-ddo", "--data", "hf://user/name", code=2).stderr
    assert "write hf://user/name" in ddo("sample", "--ckpt", "hf://user", code=2).stderr
