# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Hub ids, without a network: a server on this machine speaks as much of the hub as is needed."""

import functools
import http.server
import json
import threading
import time

import numpy as np
import pytest

from sparda_jax.errors import CheckpointError
from sparda_jax.model import SpardaLM
from sparda_jax.testing import tiny_model
from sparda_jax.tokenizer import HuggingFaceTokenizer
from sparda_jax.weights import heads_of
from sparda_jax.weights.folder import resolve_folder

constants = pytest.importorskip(
    "huggingface_hub.constants", reason="needs the package huggingface-hub"
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = {
    "README.md": b"# a card",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"the same weights under other names",
    "original/model.safetensors": b"and again",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"another program",
    "modeling_minicpm.py": b"raise RuntimeError",
}
"""What repositories hold besides, none of it needed."""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for one repository, `owner/tiny`, and notes the files that are fetched."""

    protocol_version = "HTTP/1.1"

    def __init__(self, files, fetched, *arguments):
        self.files, self.fetched = files, fetched
        super().__init__(*arguments)

    def log_message(self, format, *args):
        """Keep still."""

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/tiny/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{number:040x}"}
                for number, (name, data) in enumerate(self.files.items())
            ]
            self.answer(json.dumps(listed).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/owner/tiny"):
            names = [{"rfilename": name} for name in self.files]
            told = {"id": "owner/tiny", "sha": COMMIT, "siblings": names}
            self.answer(json.dumps(told).encode(), Content_Type="application/json")
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            name = path.split("/", 5)[-1]
            if self.command == "GET":
                self.fetched.append(name)
            place = list(self.files).index(name)
            self.answer(self.files[name], ETag=f'"{place:040x}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(b'{"error": "Repository not found"}', 401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


NOBODY = "http://127.0.0.1:9"  # no program listens there


def point_to(endpoint, monkeypatch):
    """Let the client ask this hub: what `HF_ENDPOINT` does when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads, a hub that is not there, and no bars."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(NOBODY, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def model():
    return tiny_model(seed=3)


@pytest.fixture
def files(model, tmp_path):
    """A repository of two shards and more, by name."""
    folder = tmp_path / "made"
    tokenizer = tmp_path / "tokenizer.json"
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    words = tokenizers.models.WordLevel(vocab={"<unk>": 0, "word": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(tokenizer))
    model.save_pretrained(folder, tokenizer_files=[tokenizer], max_shard_bytes=30_000)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text("{}")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def fetched(cache, files, monkeypatch):
    """The names of the files that were fetched from the served repository."""
    names = []
    handler = functools.partial(Hub, files | OTHERS, names)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield names
        server.shutdown()
        thread.join()


def test_a_hub_id_loads_and_only_what_is_needed_travels(fetched, files, model):
    assert sum(name.startswith("model-") for name in files) > 1
    loaded = SpardaLM.from_pretrained("owner/tiny", progress=None)
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.embed[...], model.embed[...])
    assert heads_of(loaded).entry.tobytes() == heads_of(model).entry.tobytes()
    assert sorted(fetched) == sorted(files)
    folder = resolve_folder("owner/tiny")
    assert folder.name == COMMIT
    assert HuggingFaceTokenizer(folder).encode("word") == [1]
    assert sorted(fetched) == sorted(files), "what is in the cache travels once"


def test_what_was_downloaded_loads_without_a_network(fetched, monkeypatch, model):
    resolve_folder("owner/tiny")
    point_to(NOBODY, monkeypatch)
    again = SpardaLM.from_pretrained("owner/tiny", progress=None)
    np.testing.assert_array_equal(again.embed[...], model.embed[...])


def test_without_a_network_a_hub_id_is_one_clear_line_at_once(cache):
    begin = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        SpardaLM.from_pretrained("owner/tiny", progress=None)
    assert time.perf_counter() - begin < 30.0
    text = str(error.value)
    assert text.startswith("owner/tiny is not a folder and could not be downloaded (")
    assert "Connection refused" in text
    assert text.endswith("; download it elsewhere and give its folder")
    assert "\n" not in text


@pytest.mark.usefixtures("fetched")
def test_an_id_that_the_hub_does_not_know_is_one_clear_line():
    with pytest.raises(CheckpointError) as error:
        resolve_folder("owner/absent")
    assert "owner/absent is not a folder and could not be downloaded (Repo" in str(error.value)
    assert "\n" not in str(error.value)
