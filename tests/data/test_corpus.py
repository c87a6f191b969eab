"""Every bad or odd file with every decoder: the right frames, or an error that says why."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import pytest
import torch
from corpus import CANARY, CASES, COUNT, make_corpus, playlist, script
from corpus_outcomes import DECODERS, Outcome, installed, outcomes
from make_video import read_numbers, write_video

from vidtrain.data.decode import open_video
from vidtrain.types import DecodeError


@pytest.fixture(scope="module")
def corpus() -> Iterator[dict[str, Path]]:
    # not pytest's own folder, which only its owner may enter: one file is tried as another user
    with tempfile.TemporaryDirectory(prefix="vidtrain-corpus-") as name:
        Path(name).chmod(0o755)
        yield make_corpus(Path(name))


@pytest.fixture(scope="module")
def decoders(corpus: dict[str, Path]) -> list[str]:
    return [decoder for decoder in DECODERS if installed(decoder, corpus["sound.mp4"])]


@pytest.fixture(scope="module")
def found(corpus: dict[str, Path], decoders: list[str]) -> list[Outcome]:
    return list(outcomes(corpus.values(), decoders))


@pytest.mark.parametrize("decoder", DECODERS)
def test_right_frames_or_the_reason(
    decoder: str, found: list[Outcome], decoders: list[str]
) -> None:
    if decoder not in decoders:
        pytest.skip(f"{decoder} is not installed")
    mine = {outcome.name: outcome for outcome in found if outcome.decoder == decoder}
    assert list(mine) == list(CASES)
    assert {name: outcome.faults for name, outcome in mine.items() if outcome.faults} == {}
    fine = {name for name, outcome in mine.items() if outcome.right and not outcome.reason}
    sound = {name for name, case in CASES.items() if case.numbers and case.reason is None}
    if decoder == "pyav":
        assert fine == sound
    else:  # they refuse some, but not what they can do
        plain = {"sound.mp4", "29.97.mp4", "rotated 90.mp4", "HEVC.mp4", "VP9.webm", "8K.mkv"}
        assert plain <= fine


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """An address where a video can be had, and what has been asked for there."""
    asked: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder, "a.ts"), COUNT, numbers=range(CANARY, CANARY + COUNT))
        content = video.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep the tests' output clean."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_file_makes_us_fetch_from_the_web(
    decoder: str, requests: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = requests
    if not installed(decoder, write_video(tmp_path / "a.mp4", 3)):
        pytest.skip(f"{decoder} is not installed")
    contents = {
        "a.m3u8": playlist(f"{address}/a.ts"),
        "b.m3u8": playlist("a.ts").replace("#EXTINF", f'#EXT-X-MAP:URI="{address}/a.ts"\n#EXTINF'),
        "a.ffconcat": script(f"{address}/a.ts"),
        "b.mp4": script(f"{address}/a.ts"),
        "a.mpd": f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{address}/</BaseURL></MPD>',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        for source in (tmp_path / name, content.encode()):
            with pytest.raises(DecodeError, match="not a video but text"):
                open_video(source, decoder)
    for name in (f"{address}/a.ts", address.replace("http://", "tcp://")):
        with pytest.raises(DecodeError, match="file not found"):
            open_video(name, decoder)
    assert asked == []


def test_libav_left_alone_would_read_other_files(
    corpus: dict[str, Path], requests: tuple[str, list[str]], tmp_path: Path
) -> None:
    """The corpus is armed: each of these gives the frames of another file, if it is let."""
    address, asked = requests
    (tmp_path / "a.m3u8").write_text(playlist(f"{address}/a.ts"))
    anything: dict[str, dict[str, str]] = {
        **{
            str(corpus[name]): {} for name in ("script.ffconcat", "playlist.m3u8", "pattern %d.png")
        },
        str(tmp_path / "a.m3u8"): {"protocol_whitelist": "file,http,tcp"},
    }
    for path, options in anything.items():
        with av.open(path, container_options=options) as container:
            frame = next(container.decode(video=0))
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        assert read_numbers(picture.permute(2, 0, 1)[None])[0] >= CANARY
    assert asked
    elsewhere = corpus["data elsewhere.mp4"]
    with av.open(str(elsewhere), container_options={"enable_drefs": "1"}) as container:
        packet = next(container.demux(video=0))
        assert bytes(packet) in elsewhere.with_name("canary.mp4").read_bytes()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["concat:canary.mp4", "file:canary.mp4", "http:a.mp4", "a:b.mp4"])
def test_a_relative_name_that_looks_like_an_address(
    name: str, decoder: str, corpus: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    if not installed(decoder, corpus["sound.mp4"]):
        pytest.skip(f"{decoder} is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus["sound.mp4"].with_name("canary.mp4"), "canary.mp4")
    shutil.copy(corpus["sound.mp4"], name)
    with open_video(name, decoder) as reader:
        assert read_numbers(reader.frames([4, 20])) == [4, 20]
        assert reader.path == name


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_socket_is_no_file(decoder: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.mp4")
        with pytest.raises(DecodeError, match="a socket, not a file"):
            open_video("a.mp4", decoder)
