"""Fetching and reading files of weights: checksums, wholeness, and nothing that is run."""

import argparse
import hashlib
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vidtrain.types import UserError
from vidtrain.weights.files import Address, fetch, parse_url, place, read

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    """A server of a folder; of `short...` it sends less than it says, and it counts what is asked."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "net.pth").write_bytes(CONTENT)
    (folder / "short.pth").write_bytes(CONTENT)
    Quiet.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_file_is_fetched_once_and_kept_under_its_checksum(server, tmp_path):
    said = []
    address = parse_url(f"{server}/net.pth#sha256={HASH}")
    path = fetch(address, tmp_path / "cache", said.append)
    assert path.name == f"net-{HASH[:8]}.pth" and path.read_bytes() == CONTENT
    assert fetch(address, tmp_path / "cache", said.append) == path
    assert Quiet.asked == ["/net.pth"] and len(said) == 1


def test_another_file_than_meant_is_not_kept(server, tmp_path):
    address = parse_url(f"{server}/net.pth#sha256={'0' * 64}")
    with pytest.raises(UserError, match=f"its checksum is {HASH}, not 0000"):
        fetch(address, tmp_path, print)
    with pytest.raises(UserError, match="broke off after 7000 of 100000 bytes"):
        fetch(parse_url(f"{server}/short.pth#sha256={HASH}"), tmp_path, print)
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob(".*.pth.????????????*"))


def test_offline_it_says_what_to_download_and_where_to_put_it(tmp_path):
    address = Address("http://127.0.0.1:9/r3d_18-b3b3357e.pth", "b3b3357e")
    target = tmp_path / "r3d_18-b3b3357e.pth"  # the checksum is in the name already
    assert place(address, tmp_path) == target
    with pytest.raises(UserError) as error:
        fetch(address, tmp_path, print)
    assert address.url in str(error.value) and f"put it at {target}" in str(error.value)
    assert "\n" not in str(error.value)

    target.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is not what .* should be"):
        fetch(address, tmp_path, print)
    put = Address(address.url.replace("b3b3357e", HASH[:8]), HASH[:8])
    place(put, tmp_path).write_bytes(CONTENT)
    assert fetch(put, tmp_path, print).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "value",
    [
        "https://example.org/net.pth",
        "https://example.org/net.pth#sha256=",
        "https://example.org/net.pth#md5=0123456789abcdef",
        "https://example.org/net.pth#sha256=0123456",
        "https://example.org/net.pth#sha256=xyzxyzxyz",
    ],
)
def test_an_address_without_a_checksum_is_refused(value):
    with pytest.raises(UserError, match="has no checksum"):
        parse_url(value)


@pytest.mark.parametrize(
    "value", ["file:///etc/passwd#sha256=0123456789", "ftp://h/x#sha256=0123456789"]
)
def test_only_http_is_fetched(value):
    with pytest.raises(UserError, match="only http"):
        parse_url(value)


def test_no_address_leaves_the_cache(tmp_path):
    for path in ("..%2F..%2Fetc%2Fx.pth", "a/../../x.pth", "x%00y.pth", ""):
        found = place(Address(f"https://h/{path}", HASH), tmp_path)
        assert found.parent == tmp_path and found.name not in ("", ".", "..")


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "bomb": Bomb()}, "bomb.pth")
    with open("blobs.pkl", "wb") as file:
        pickle.dump({"blobs": {"conv1_w": [1.0]}, "net": Bomb()}, file)
    for name in ("bomb.pth", "blobs.pkl"):
        with pytest.raises(UserError, match="nothing in a file is run") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()
    torch.save(nn.Linear(2, 2), "whole.pth")
    with pytest.raises(UserError, match="save its state dict alone"):
        read(tmp_path / "whole.pth")


def test_a_programs_arguments_may_lie_beside_the_tensors(tmp_path):
    arguments = argparse.Namespace(lr=1e-3, model="vit", sizes=[16, 224])
    torch.save({"model": {"a": torch.ones(1)}, "args": arguments}, tmp_path / "w.pth")
    file = read(tmp_path / "w.pth")
    assert set(file.tensors) == {"a"} and file.extra["args"] == arguments
    arguments.bomb = Bomb()
    torch.save({"model": {"a": torch.ones(1)}, "args": arguments}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="nothing in a file is run"):
        read(tmp_path / "w.pth")


def test_safetensors(tmp_path):
    state = {"a.weight": torch.randn(3, 2), "b": torch.ones(4).half()}
    save_file(state, tmp_path / "w.safetensors", metadata={"format": "pt"})
    file = read(tmp_path / "w.safetensors")
    assert set(file.tensors) == set(state) and not file.extra
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in state.items())
    whole = (tmp_path / "w.safetensors").read_bytes()
    torch.save(state, tmp_path / "other.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(whole[:-5])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("other", "none", "torn", "empty"):
        with pytest.raises(UserError, match=r"holds no tensors|no whole file") as error:
            read(tmp_path / f"{name}.safetensors")
        assert name in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_of_tensors_is_one_line(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.ones(100)}, whole)
    (tmp_path / "torn.pth").write_bytes(whole.read_bytes()[:-300])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for name in ("torn", "empty", "text", "list", "none"):
        with pytest.raises(UserError) as error:
            read(tmp_path / f"{name}.pth")
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model_state", "state_dict", "model", "module", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_its_makers_wrapping_comes_off(tmp_path, name, prefix):
    state = {f"{prefix}a.weight": torch.ones(2), f"{prefix}a.bias": torch.zeros(2)}
    content = state if name is None else {name: state, "epoch": 3, "cfg": "x: 1"}
    for old in (False, True):  # files of before 2020 are no zip archives
        path = tmp_path / f"{old}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        file = read(path)
        assert set(file.tensors) == {"a.weight", "a.bias"}
        assert file.extra == ({} if name is None else {"epoch": 3, "cfg": "x: 1"})
