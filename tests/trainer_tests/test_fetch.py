"""Downloading through the real huggingface_hub from a server on loopback that speaks the hub's
protocol. Each fetch runs in its own process, because huggingface_hub reads HF_ENDPOINT once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.data.dataset import Dataset

pytest.importorskip("huggingface_hub")

REPOSITORY = "someone/shards"
VARIANT = f"sp{VOCAB_SIZE}"
SCRIPT = """
import json, sys
from pathlib import Path
from trainer.data.fetch import fetch
from trainer.errors import DataError
out, repository, shards = sys.argv[1:4]
told = []
try:
    made = fetch("VARIANT", Path(out), int(shards) or None, repository, "root",
                 progress=lambda *step: told.append(step))
    print(json.dumps({"made": made, "told": told}))
except DataError as error:
    print(json.dumps({"error": str(error)}))
""".replace("VARIANT", VARIANT)


class Hub(ThreadingHTTPServer):
    """Serves a folder as the repository `REPOSITORY`, and remembers what was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.downloads: list[str] = []

    @property
    def commit(self) -> str:
        """Changes with the manifest, as a real repository's does with every change."""
        return hashlib.sha1((self.folder / "root" / "manifest.json").read_bytes()).hexdigest()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        prefix = f"/datasets/{REPOSITORY}/resolve/main/"
        path = self.path.split("?")[0]
        name = path.removeprefix(prefix)
        file = self.server.folder / name
        if name == path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if with_body:
            self.server.downloads.append(name)
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A repository of 3 training shards and 2 validation shards, with its manifest."""
    root = tmp_path / "repository" / "root"
    shards = root / "datasets" / f"fineweb10B_{VARIANT}"
    write_folder(tmp_path / "made", random_tokens(2500), random_tokens(1300, 1))
    shards.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    for path in (tmp_path / "made").glob("*.bin"):
        path.rename(shards / path.name.replace("small", "fineweb"))
    (tmp_path / "made" / "small.model").rename(root / "tokenizers" / "fineweb_400_bpe.model")
    write_manifest(root)
    server = Hub(tmp_path / "repository")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def write_manifest(root: Path, **stats: int) -> None:
    counts = {"files_train": 3, "files_val": 2, "tokens_train": 2500, "tokens_val": 1300}
    manifest = {
        "datasets": [
            {
                "name": f"fineweb10B_{VARIANT}",
                "tokenizer_name": "sp_bpe_400",
                "stats": counts | stats,
            }
        ],
        "tokenizers": [{"name": "sp_bpe_400", "model_path": "tokenizers/fineweb_400_bpe.model"}],
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


def run_fetch(
    hub: Hub, out: Path, num_shards: int, repository: str = REPOSITORY, address: str = ""
) -> dict[str, Any]:
    """What fetch returned or said, run with this hub and a cache of the test's own."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address or hub.address,
        "HF_HOME": str(hub.folder.parent / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), repository, str(num_shards)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_downloads_all_and_goes_on_from_its_cache(hub: Hub, tmp_path: Path) -> None:
    first = run_fetch(hub, tmp_path / "out", 1)
    assert first["made"]["train_tokens"] == 1000
    assert first["told"] == [["download", n, 4] for n in range(1, 5)]
    hub.downloads.clear()
    made = run_fetch(hub, tmp_path / "out", 0)["made"]
    dataset = Dataset.open(tmp_path / "out", VOCAB_SIZE)
    assert made == {
        "dir": str(tmp_path / "out"),
        "vocab_size": VOCAB_SIZE,
        "train_tokens": 2500,
        "val_tokens": 1300,
        "digest": dataset.digest,
    }
    assert dataset.read_val().tolist() == random_tokens(1300, 1).tolist()
    names = sorted(name.rsplit("/", 1)[-1] for name in hub.downloads)
    assert names == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "manifest.json"]


def test_a_stale_manifest_is_not_used(hub: Hub, tmp_path: Path) -> None:
    root = hub.folder / "root"
    write_manifest(root, files_train=1)
    assert "ask for 1 to 1" in run_fetch(hub, tmp_path / "out", 2)["error"]
    write_manifest(root)
    assert run_fetch(hub, tmp_path / "out", 2)["made"]["train_tokens"] == 2000


def test_counts_that_differ_from_the_manifest_are_refused(hub: Hub, tmp_path: Path) -> None:
    write_manifest(hub.folder / "root", tokens_val=1301)
    error = run_fetch(hub, tmp_path / "out", 1)["error"]
    assert "1300 val tokens downloaded, the manifest states 1301" in error
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_downloaded_is_named(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (hub.folder / "root" / "tokenizers" / "fineweb_400_bpe.model").unlink()
    absent = run_fetch(hub, out, 1)["error"]
    assert "cannot download root/tokenizers/fineweb_400_bpe.model" in absent
    elsewhere = run_fetch(hub, out, 1, "no/one")["error"]
    assert "no/one: cannot download root/manifest.json" in elsewhere
    unreachable = run_fetch(hub, out, 1, address="http://127.0.0.1:9")["error"]
    assert "check the network, HF_ENDPOINT" in unreachable
    (hub.folder / "root" / "manifest.json").write_text('{"datasets": [{"name": "other"}]}')
    unlisted = run_fetch(hub, out, 1)["error"]
    assert f"no datasets entry fineweb10B_{VARIANT}; it has other" in unlisted
    assert not out.exists()
