"""From what the user wrote to a file of tensors: paths, names and addresses with a checksum.

Nothing is fetched without a checksum, and nothing that a file holds is run: only tensors and plain
values are read.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import os
import pickle
import re
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from vidtrain.types import UserError
from vidtrain.weights.layout import File

TIMEOUT = 30  # seconds without a byte from the server
PIECE = 1 << 20  # bytes
# What the makers of files call the part that holds the tensors.
INSIDE = ("model_state", "state_dict", "model_state_dict", "model", "module", "net")
# Beside the tensors lie a program's arguments: names and values, nothing that runs.
PLAIN: list[Any] = [argparse.Namespace]
WRAPPERS = ("module.", "_orig_mod.")  # that torch puts before all keys


class Address(NamedTuple):
    """Where a file is and what it must be."""

    url: str
    sha256: str  # the checksum, or how it begins


def parse_url(value: str) -> Address:
    """Read `https://host/file.pth#sha256=HEX`.

    Raises:
        UserError: it is no http address, or has no checksum.
    """
    url, _, fragment = value.partition("#")
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"model.weights={value}: only http and https addresses are fetched")
    checksum = fragment.removeprefix("sha256=").lower()
    if not fragment.startswith("sha256=") or not re.fullmatch(r"[0-9a-f]{8,64}", checksum):
        raise UserError(
            f"model.weights={value} has no checksum: add #sha256= and its 64 digits"
            " (sha256sum FILE prints them), so that what is fetched is what you mean"
        )
    return Address(url, checksum)


def place(address: Address, cache: Path) -> Path:
    """Say where a fetched file is kept: `r3d_18-b3b3357e.pth`, its checksum always in its name."""
    name = PurePosixPath(unquote(urlsplit(address.url).path)).name or "weights"
    name = re.sub(r"[^\w.+-]", "_", name)
    short = address.sha256[:8]
    if short not in name:
        stem, dot, ending = name.rpartition(".")
        name = f"{stem}-{short}.{ending}" if dot else f"{name}-{short}"
    return cache / name


def fetch(address: Address, cache: Path, say: Callable[[str], None]) -> Path:
    """Fetch a file once; afterwards, or if the user put it there, take it from the cache.

    The file appears whole or not at all, and under its checksum.

    Raises:
        UserError: it cannot be had, and where to put it by hand; or it is not the file of that
            checksum.
    """
    target = place(address, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ranks of one machine fetch it once
            if not target.is_file():
                say(f"fetching {address.url}")
                _download(address, target)
                return target
    except OSError as error:
        raise UserError(f"{cache} cannot be written ({error}); name another paths.cache") from None
    found = checksum(target)
    if not found.startswith(address.sha256):
        raise UserError(
            f"{target} is not what {address.url} should be: its checksum is {found}, not"
            f" {address.sha256}; delete it, or put the right file there"
        )
    return target


def _download(address: Address, target: Path) -> None:
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(address.url, timeout=TIMEOUT) as answer,
            part.open("wb") as file,
        ):
            while piece := answer.read(PIECE):
                digest.update(piece)
                file.write(piece)
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) != file.tell():
                raise OSError(f"it broke off after {file.tell()} of {length} bytes")
        if not digest.hexdigest().startswith(address.sha256):
            raise UserError(
                f"{address.url} is another file than you mean: its checksum is"
                f" {digest.hexdigest()}, not {address.sha256}"
            )
        os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot fetch {address.url} ({reason}); where there is a network, download it, and put"
            f" it at {target}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def checksum(path: Path) -> str:
    """Compute a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def read(path: Path) -> File:
    """Read a file's tensors to the CPU, without running anything that is in it.

    Its maker's wrapping comes off: the entry that holds the tensors, and a prefix of all keys. A file
    whose name ends in `.safetensors` has neither.

    Raises:
        UserError: it cannot be read, holds Python objects, or no tensors.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        mapped = zipfile.is_zipfile(path)  # older files cannot be mapped
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")  # that other makers' files are of another protocol
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0].rstrip(". ")
        raise UserError(
            f"{path} is not a plain file of tensors ({reason}), and nothing in a file is run;"
            " open it where it was made, and save its state dict alone with torch.save"
        ) from None
    except Exception as error:  # torch raises anything over bytes that are no file of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no whole file that torch.save wrote ({reason})") from None
    tensors, extra = unwrap(content)
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; save a state dict with torch.save")
    return File(path, tensors, extra)


def _read_safetensors(path: Path) -> File:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # of its own kind, or the system's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no whole file of safetensors ({reason})") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return File(path, tensors)


def unwrap(content: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Find the tensors in what a file holds, and what lies beside them."""
    if not isinstance(content, Mapping):
        return {}, {}
    extra: dict[str, Any] = {}
    for name in INSIDE:
        inner = content.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            extra = {key: value for key, value in content.items() if key != name}
            content = inner
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors, extra
