"""Test remote datasets: a server with faults, commands, fsspec stores, and the cache that they share."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import data.fetch.transport
from data.errors import DataError
from data.fetch.cache import Cache
from data.fetch.sources import ReadOptions, open_source
from data.fetch.transport import FetchError
from data.shards.manifest import load_manifest
from data.stream.dataset import open_dataset
from data.stream.token_stream import TokenStream
from tests.data.made import SEQ_LENGTH, make_dataset

SIZES = [40, 40, 40, 40]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.fetch.transport, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", SIZES)


def options(tmp_path: Path, **changes: object) -> ReadOptions:
    fields: dict = {"cache_dir": tmp_path / "cache", "fetch_time_limit_s": 5.0, "allow_commands": True, **changes}
    return ReadOptions(**fields)


def read_epoch(path: str | Path, options: ReadOptions) -> list[int]:
    stream = TokenStream(path, "train", SEQ_LENGTH, 2, window_shards=2, options=options)
    try:
        return [int(row[0]) for _ in range(sum(SIZES) // 2) for row in next(stream)]
    finally:
        stream.close()


class Server:
    """A loopback server. `fail` returns the fault of each request: a status, "cut", "flip", "hang", "trickle",
    "length", "headers", "chunks", "escapes" or None.
    """

    def __init__(self, folder: Path) -> None:
        self.fail = lambda number, name: None
        self.redirect = ""
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path.strip("/"))
                how = outer.fail(len(outer.requests), self.path.strip("/"))
                path = folder / self.path.strip("/")
                if outer.redirect:
                    self.send_response(302)
                    self.send_header("Location", outer.redirect)
                    self.end_headers()
                    return
                if isinstance(how, int) or not path.exists():
                    self.send_error(how or 404)
                    return
                if how == "escapes":
                    self.send_error(404, "\x1b[2J\tgone")
                    return
                body = bytearray(path.read_bytes())
                self.send_response(200)
                if how in ("headers", "chunks"):
                    self.flush_headers()
                    self.wfile.write(b"X-Padding: " if how == "headers" else b"Transfer-Encoding: chunked\r\n\r\n5;")
                    while not outer.released.wait(0.05):
                        self.wfile.write(b"a")
                    return
                self.send_header("Content-Length", "many" if how == "length" else str(len(body)))
                self.end_headers()
                if how == "hang":
                    outer.released.wait(20)
                    return
                while how == "trickle" and not outer.released.wait(0.05):
                    self.wfile.write(b" ")
                if how == "flip":
                    body[len(body) // 2] ^= 1
                self.wfile.write(body[: len(body) // 2] if how == "cut" else body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.released = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(made: Path) -> Iterator[Server]:
    server = Server(made)
    yield server
    server.close()


def test_http_gives_what_the_folder_gives(made: Path, server: Server, tmp_path: Path) -> None:
    assert read_epoch(server.address, options(tmp_path)) == read_epoch(made, options(tmp_path))
    assert sorted(server.requests) == sorted({*server.requests})  # nothing was fetched twice


def test_a_server_that_fails_now_and_then_does_no_harm(made: Path, server: Server, tmp_path: Path) -> None:
    kinds = (503, "cut", "flip", 429)
    server.fail = lambda number, name: kinds[number // 3 % 4] if number % 3 == 0 and name.endswith(".tar") else None
    assert read_epoch(server.address, options(tmp_path)) == read_epoch(made, options(tmp_path))


def test_a_manifest_that_is_cut_on_the_way_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.fail = lambda number, name: "cut" if number < 3 else None
    load_manifest(server.address, options(tmp_path))
    assert len(server.requests) == 3


def test_a_silent_server_is_given_up_within_the_time_limit(server: Server, tmp_path: Path) -> None:
    server.fail = lambda number, name: "hang" if number == 1 else None
    load_manifest(server.address, options(tmp_path, fetch_time_limit_s=0.3))
    assert len(server.requests) == 2


def test_a_server_that_trickles_is_given_up_too(server: Server, tmp_path: Path) -> None:
    server.fail = lambda number, name: "trickle"
    with pytest.raises(DataError, match=r"only \d bytes received in 0.2 s"):
        load_manifest(server.address, options(tmp_path, fetch_time_limit_s=0.2, fetch_attempts=1))


@pytest.mark.parametrize("how", ["headers", "chunks"])
def test_a_server_that_trickles_what_is_no_content_is_given_up_too(server: Server, tmp_path: Path, how: str) -> None:
    server.fail = lambda number, name: how
    with pytest.raises(DataError, match=r"no data received for 0.2 s"):
        load_manifest(server.address, options(tmp_path, fetch_time_limit_s=0.2, fetch_attempts=1))


@pytest.mark.parametrize(
    ("how", "message"), [("length", "of many bytes received"), ("escapes", r"answers 404 \\x1b\[2J\\tgone; check")]
)
def test_what_a_server_says_can_neither_break_nor_steer(server: Server, tmp_path: Path, how: str, message: str) -> None:
    server.fail = lambda number, name: how
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(server.address, options(tmp_path, fetch_attempts=1))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("address", ["http://", "https:///set", "http://host:port", "http://[::1"])
def test_what_is_no_address_is_told_at_once(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match="not an address"):
        load_manifest(address, options(tmp_path))


@pytest.mark.parametrize(("how", "message", "tries"), [("flip", "sha256", 3), (503, "3 attempts", 3), (404, "404", 1)])
def test_lasting_failures_are_told(server: Server, tmp_path: Path, how: object, message: str, tries: int) -> None:
    server.fail = lambda number, name: how if name == "tokenizer.model" else None  # type: ignore[assignment]
    manifest = load_manifest(server.address, options(tmp_path, fetch_attempts=3))
    with pytest.raises(DataError, match=message):
        _ = manifest.tokenizer_path
    assert server.requests.count("tokenizer.model") == tries
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be fetched in 2 attempts"):
        load_manifest("http://127.0.0.1:9", options(tmp_path, fetch_attempts=2))


def test_a_pipe_gives_what_the_folder_gives(made: Path, tmp_path: Path) -> None:
    assert read_epoch(f"pipe:cat {made}/{{}}", options(tmp_path)) == read_epoch(made, options(tmp_path))


def test_a_pipe_that_ends_early_with_status_0_is_caught(made: Path, tmp_path: Path) -> None:
    command = f"pipe:head -c $([ {{}} = train-000002.tar ] && echo 512 || echo 99999) {made}/{{}}"
    with pytest.raises(DataError, match=r"train-000002.*512 bytes received, expected 10240"):
        read_epoch(command, options(tmp_path, fetch_attempts=2))


def test_damage_at_the_origin_falls_under_the_policy(made: Path, server: Server, tmp_path: Path) -> None:
    content = bytearray((made / "train-000002.tar").read_bytes())
    content[900] ^= 1
    (made / "train-000002.tar").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"train-000002.*received sha256 {hashlib.sha256(content).hexdigest()}, expected"
    ):
        read_epoch(server.address, options(tmp_path, fetch_attempts=2))
    server.requests.clear()
    skipping = options(tmp_path, fetch_attempts=2, on_damage="skip")
    assert read_epoch(server.address, skipping) == read_epoch(made, skipping)
    assert server.requests.count("train-000002.tar") <= 4  # by the thread that fetches ahead and by the reader


def test_a_server_that_is_down_does_not_pass_for_damage(server: Server, tmp_path: Path) -> None:
    """Otherwise the network of one rank would decide what all ranks read."""
    server.fail = lambda number, name: 503 if name == "train-000002.tar" else None
    with pytest.raises(DataError, match=r"train-000002.*could not be fetched"):
        read_epoch(server.address, options(tmp_path, fetch_attempts=2, on_damage="skip"))


def test_a_cached_copy_that_others_remove_or_mend_does_not_pass_for_damage(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the file before it is opened, and again before it is dropped from the cache."""
    skipping = options(tmp_path, on_damage="skip")
    expected = read_epoch(server.address, skipping)
    monkeypatch.setattr("data.stream.samples.SampleReader._fetch_ahead", lambda reader, position: None)
    real, num_opened = os.open, []

    def remove_first(path: Any, *arguments: Any) -> int:
        if Path(path).suffix or Path(path).name == "lock":
            return real(path, *arguments)
        num_opened.append(path)
        if len(num_opened) == 1:
            os.unlink(path)
        return real(path, *arguments)

    monkeypatch.setattr("data.shards.verified_file.os.open", remove_first)
    assert read_epoch(server.address, skipping) == expected
    assert len(num_opened) == 5


def test_a_disk_that_damages_what_is_cached_stops_the_run_whatever_the_policy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault concerns only the ranks of one machine."""
    rename = Path.rename

    def damage(path: Path, target: Path) -> Path:
        path.write_bytes(bytes(path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", damage)
    with pytest.raises(
        DataError, match=r"its copy in .*cache is damaged or gone as soon as it is fetched .*check that"
    ):
        read_epoch(server.address, options(tmp_path, on_damage="skip"))


def test_a_digest_list_that_is_damaged_on_the_way_is_fetched_again(made: Path, server: Server, tmp_path: Path) -> None:
    seen: set[str] = set()

    def once(number: int, name: str) -> str | None:
        is_first = name.endswith(".digests") and name not in seen
        seen.add(name)
        return "flip" if is_first else None

    server.fail = once  # type: ignore[assignment]
    assert read_epoch(server.address, options(tmp_path, on_damage="skip")) == read_epoch(made, options(tmp_path))
    assert len([name for name in server.requests if name.endswith(".tar")]) == len(SIZES)


def test_a_cache_that_cannot_be_written_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache .*: cannot be written \(Not a directory\); free space"):
        read_epoch(server.address, options(tmp_path))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pipe:false {}", "status 1"),
        ("pipe:sleep 9; cat {}", "nothing for"),
        ("pipe:while printf x; do sleep 0.05; done; cat {}", "bytes received in 0.2 s"),
    ],
)
def test_a_pipe_that_fails_or_hangs_is_told(tmp_path: Path, command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_manifest(command, options(tmp_path, fetch_attempts=2, fetch_time_limit_s=0.2))


@pytest.mark.parametrize(
    "address",
    ["pipe:touch {canary} {{}}", "simplecache::pipe://touch {canary}", "reference://{canary}", "a::file://{canary}"],
)
def test_no_code_runs_unless_the_user_allows_it(tmp_path: Path, address: str) -> None:
    canary = tmp_path / "canary"
    address = address.format(canary=canary)
    (tmp_path / "mixture.json").write_text(json.dumps({"datasets": [{"path": address, "weight": 1}]}))
    for named in (address, tmp_path / "mixture.json"):
        with pytest.raises(DataError, match="runs a command; if you trust it"):
            open_dataset(named, options(tmp_path, allow_commands=False))
    assert not canary.exists()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://x"])
def test_a_redirect_to_another_scheme_is_refused(server: Server, tmp_path: Path, target: str) -> None:
    server.redirect = target
    with pytest.raises(DataError) as error:
        load_manifest(server.address, options(tmp_path))
    assert "redirect" in str(error.value).lower()


def test_a_redirect_to_the_same_scheme_is_followed(made: Path, server: Server, tmp_path: Path) -> None:
    other = Server(made)
    server.redirect = f"{other.address}/manifest.json"
    assert load_manifest(server.address, options(tmp_path)).fingerprint == load_manifest(made).fingerprint
    other.close()


def test_the_cache_removes_only_what_is_its_own(tmp_path: Path) -> None:
    theirs = [tmp_path / "cache/ab/thesis.tex", tmp_path / "cache/ab/x.partial", tmp_path / "cache/ab" / ("c" * 64)]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    (tmp_path / "cache/lock").write_text("not a lock")
    cache = Cache(tmp_path / "cache", 100)
    contents = [bytes([number]) * 60 for number in range(3)]  # only one fits at a time
    for content in contents:
        cache.fill(hashlib.sha256(content).hexdigest(), 60, [content], "x")
    assert [cache.find(hashlib.sha256(content).hexdigest(), 60) is not None for content in contents] == [0, 0, 1]
    assert [path.read_text() for path in theirs] == ["precious"] * 3
    assert (tmp_path / "cache/lock").read_text() == "not a lock"


def test_a_pipe_has_to_say_where_the_name_goes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\{\}"):
        load_manifest("pipe:cat x", options(tmp_path))


@pytest.mark.parametrize("name", ["cache_gigabytes", "fetch_attempts", "fetch_time_limit_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, 1e300])
def test_a_size_or_time_that_cannot_be_is_told(name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{name} is {re.escape(str(value))}, expected a positive number"):
        ReadOptions.of({name: value})


def test_an_address_that_cannot_be_read_here_is_told_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gopher://host: cannot be read here .*name a folder, http") as caught:
        load_manifest("gopher://host", options(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_object_store_gives_what_the_folder_gives(made: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in made.iterdir():
        store.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    assert read_epoch("memory://bucket/set", options(tmp_path)) == read_epoch(made, options(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        load_manifest("memory://bucket/absent", options(tmp_path))


def test_a_store_that_raises_errors_of_its_own_is_asked_again_and_given_up(tmp_path: Path) -> None:
    class NoCredentialsError(Exception):
        pass

    class Refusing(MemoryFileSystem):
        protocol = "refusing"
        asked = 0

        def _open(self, *arguments: Any, **more: Any) -> Any:
            Refusing.asked += 1
            raise NoCredentialsError("unable to locate credentials")

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(DataError, match=r"in 2 attempts \(NoCredentialsError: unable to locate credentials\); check"):
        load_manifest("refusing://bucket/set", options(tmp_path, fetch_attempts=2))
    assert Refusing.asked == 2


HANGING_STORE = """
import fsspec, time
from fsspec.implementations.memory import MemoryFileSystem
from data.errors import DataError
from data.shards.manifest import load_manifest
from data.fetch.sources import ReadOptions
class Hanging(MemoryFileSystem):
    protocol = "hanging"
    def _open(self, *arguments, **more):
        time.sleep(1000)
fsspec.register_implementation("hanging", Hanging)
try:
    load_manifest("hanging://bucket/set", ReadOptions(fetch_attempts=2, fetch_time_limit_s=0.1))
except DataError as error:
    print(error)
"""


def test_an_object_store_that_hangs_is_given_up_and_the_process_ends() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING_STORE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no data received for 0.1 s" in done.stdout


def test_a_damaged_cached_tokenizer_is_mended(made: Path, server: Server, tmp_path: Path) -> None:
    path = load_manifest(server.address, options(tmp_path)).tokenizer_path
    path.write_bytes(b"nine")
    assert load_manifest(server.address, options(tmp_path)).tokenizer_path.read_bytes() == b"none"
    (made / "tokenizer.model").write_bytes(b"nine")
    path.write_bytes(b"nine")
    with pytest.raises(DataError, match="sha256") as caught:
        _ = load_manifest(server.address, options(tmp_path, fetch_attempts=1)).tokenizer_path
    assert type(caught.value) is DataError  # no shard, so nothing to skip


def test_a_damaged_cache_is_mended(made: Path, server: Server, tmp_path: Path) -> None:
    expected = read_epoch(server.address, options(tmp_path))
    for path in (tmp_path / "cache").glob("??/*"):
        if path.suffix != ".lock":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    server.requests.clear()
    assert read_epoch(server.address, options(tmp_path)) == expected
    assert sum(name.endswith(".tar") for name in server.requests) == 4


def test_a_truncated_cached_file_is_no_hit(made: Path, server: Server, tmp_path: Path) -> None:
    expected = read_epoch(server.address, options(tmp_path))
    for path in (tmp_path / "cache").glob("??/*"):
        os.truncate(path, min(path.stat().st_size, 512))
    assert read_epoch(server.address, options(tmp_path)) == expected


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    contents = {name: name.encode() * 1000 for name in "abcde"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name in "abc":
        os.utime(cache.fill(digests[name], 1000, [contents[name]], name), ns=(1, "abc".index(name) * 10**9))
    assert cache.find(digests["a"], 1000)
    cache.fill(digests["d"], 1000, [contents["d"]], "d")
    kept = {name for name in "abcde" if cache.find(digests[name], 1000)}
    assert kept == {"a", "c", "d"}
    with pytest.raises(DataError, match="raise cache_gigabytes"):
        cache.fill(digests["e"], 4000, [contents["e"]], "e")


KILLED_WHILE_FETCHING = """
import sys, time
from pathlib import Path
from data.fetch.cache import Cache
def pieces():
    print("fetching", flush=True)
    time.sleep(1000)
    yield b""
Cache(Path(sys.argv[1]), 1000).fill(sys.argv[2], 900, pieces(), "killed")
"""


def test_what_a_killed_process_had_begun_to_fetch_is_removed_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    digest = {size: hashlib.sha256(b"x" * size).hexdigest() for size in (100, 300, 400, 900)}
    cache.fill(digest[100], 100, [b"x" * 100], "used")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_FETCHING, str(tmp_path), digest[900]], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "fetching\n"
    process.kill()
    process.wait()

    def pieces() -> Iterator[bytes]:
        assert cache.fill(digest[300], 300, [b"x" * 300], "meanwhile").stat().st_size == 300
        yield b"x" * 400

    cache.fill(digest[400], 400, pieces(), "fetched while another is")
    assert all(cache.find(digest[size], size) for size in (100, 300, 400))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 800


def test_what_a_killed_process_left_of_the_same_file_is_counted_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    digest = {size: hashlib.sha256(b"x" * size).hexdigest() for size in (100, 900)}
    cache.fill(digest[100], 100, [b"x" * 100], "used")
    left = tmp_path / digest[900][:2] / f"{digest[900]}.partial"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(bytes(900))
    cache.fill(digest[900], 900, [b"x" * 900], "again")
    assert cache.find(digest[100], 100)


@pytest.mark.parametrize("pieces", [[b"x" * 999], [b"x" * 1001], [b"y" * 1000], [b"x" * 500] * 10**6])
def test_what_is_not_as_announced_does_not_enter_the_cache(tmp_path: Path, pieces: list[bytes]) -> None:
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    with pytest.raises(FetchError):
        Cache(tmp_path, 10_000).fill(digest, 1000, iter(pieces), "x")
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".lock"
    ]


def test_a_cache_smaller_than_the_shards_in_use_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cache_gigabytes"):
        read_epoch(server.address, options(tmp_path, cache_gigabytes=2e-5))


READER = """
import sys
from pathlib import Path
from data.fetch.sources import ReadOptions
from data.stream.token_stream import TokenStream
stream = TokenStream(sys.argv[1], "train", 4, 1, int(sys.argv[2]), 3, options=ReadOptions(cache_dir=Path(sys.argv[3])))
print([int(next(stream)[0, 0]) for _ in range(20)])
"""


def test_processes_of_a_machine_fetch_each_file_once(made: Path, server: Server, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", READER, server.address, str(rank), str(tmp_path / "cache")])
        for rank in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    fetched = [name for name in server.requests if name.endswith(".tar")]
    assert sorted(fetched) == sorted({*fetched}) and fetched


def test_a_fetched_dataset_outlives_its_origin_while_shards_are_cached(made: Path, tmp_path: Path) -> None:
    expected = read_epoch(f"pipe:cat {made}/{{}}", options(tmp_path))
    for path in made.glob("*.tar"):
        path.unlink()
    assert read_epoch(f"pipe:cat {made}/{{}}", options(tmp_path)) == expected
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="could not be fetched"):
        read_epoch(f"pipe:cat {made}/{{}} 2>/dev/null", options(tmp_path, fetch_attempts=1))


def test_only_a_remote_source_asks_for_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    open_source(tmp_path, ReadOptions())
    with pytest.raises(DataError, match=r"HOME is not set and user \d+ has no home folder"):
        open_source("https://host/dataset", ReadOptions())
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(DataError, match="HOME is not set"):
        open_source("https://host/dataset", ReadOptions())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ReadOptions().cache_folder == tmp_path / "entropy-guided-transformer"
