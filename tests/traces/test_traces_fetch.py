"""Downloads from a loopback server: good, broken off and resumed, wrong, missing, refused."""

import hashlib
import http.server
import socket
import threading
import tracemalloc

import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import lock
from biscale_env.traces import cache_dir, fetch, list_traces, load_named, read_trace
from biscale_env.traces.download import Download, Downloads, cached_path, load_downloads

ROWS = "\r\n".join(f"2023-11-16 18:00:{s:02d}.5,{100 + s},{1 + s}" for s in range(60))
CONTENT = ("TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + ROWS).encode()
NAME = "azure-conv-2023"
UNKNOWN = "mooncake-conversation"  # neither size nor digest is known
MOONCAKE = "".join(
    f'{{"timestamp": {300 * k}, "input_length": {k + 1}, "output_length": 5, "hash_ids": [{k}]}}\n'
    for k in range(50)
).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; may cut the connection after some bytes, ignore ranges, or answer an
    error.
    """

    content = CONTENT
    cut_after: int | None = None
    version: str | None = None
    says_length = True
    ranges = True
    status: int | None = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if server.status:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if self.headers.get("If-Range") not in (None, server.version):
            start = 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        if server.version:
            self.send_header("ETag", server.version)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.end_headers()
        self.wfile.write(body if server.cut_after is None else body[: server.cut_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    listing = Downloads(
        checksums_from="test",
        files={
            NAME: Download(
                url="https://example.invalid/traces/conv.csv",
                size_bytes=len(CONTENT),
                sha256=hashlib.sha256(CONTENT).hexdigest(),
                requests=60,
                citation="test",
            ),
            UNKNOWN: Download(
                url="https://example.invalid/traces/mooncake.jsonl", requests=50, citation="test"
            ),
        },
    )
    for module in ("download", "catalog"):
        monkeypatch.setattr(f"biscale_env.traces.{module}.load_downloads", lambda: listing)
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def in_cache():
    return sorted(p.name for p in cache_dir().iterdir()) if cache_dir().exists() else []


def test_good_file_is_fetched_once_and_loads_by_name(server):
    seen = []
    path = fetch(NAME, server.url, lambda done, total: seen.append((done, total)))
    assert path == cache_dir() / "conv.csv"
    assert path.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert server.requests == [("/data/conv.csv", None)]
    assert fetch(NAME, server.url) == path
    assert len(server.requests) == 1
    trace = load_named(NAME)
    assert (trace.name, len(trace), trace.prompt_tokens[0]) == (NAME, 60, 100)
    assert [e.ready for e in list_traces() if e.kind == "public"] == [True, False]
    assert in_cache() == ["conv.csv"]


def test_broken_off_download_is_continued(server):
    server.cut_after = 700
    with pytest.raises(
        BiscaleError, match=f"broke off after 700 of {len(CONTENT)} bytes; run it again"
    ):
        fetch(NAME, server.url)
    assert in_cache() == ["conv.csv.part"]
    assert cached_path(NAME) is None
    server.cut_after = None
    assert fetch(NAME, server.url).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=700-"]
    assert in_cache() == ["conv.csv"]


def test_server_that_knows_no_ranges_starts_again(server):
    cache_dir().mkdir(parents=True)
    (cache_dir() / "conv.csv.part").write_bytes(b"something else entirely")
    server.ranges = False
    assert fetch(NAME, server.url).read_bytes() == CONTENT


def test_finished_but_unchecked_part_needs_no_request(server):
    cache_dir().mkdir(parents=True)
    (cache_dir() / "conv.csv.part").write_bytes(CONTENT)
    assert fetch(NAME, server.url).read_bytes() == CONTENT
    assert server.requests == []


@pytest.mark.parametrize("change", [lambda c: c[:-1] + b"9", lambda c: c + b"more" * 10])
def test_wrong_content_is_deleted(server, change):
    server.content = change(CONTENT)
    with pytest.raises(
        BiscaleError, match=r"not the expected file: SHA-256 [0-9a-f]{64} instead of"
    ):
        fetch(NAME, server.url)
    assert in_cache() == []


def test_resumed_download_that_does_not_fit_together_is_deleted(server):
    cache_dir().mkdir(parents=True)
    (cache_dir() / "conv.csv.part").write_bytes(b"x" * 100)
    with pytest.raises(BiscaleError, match="deleted"):
        fetch(NAME, server.url)
    assert in_cache() == []
    assert fetch(NAME, server.url).read_bytes() == CONTENT


def test_damaged_file_in_the_cache_is_replaced(server):
    cache_dir().mkdir(parents=True)
    (cache_dir() / "conv.csv").write_bytes(CONTENT[:-1] + b"9")
    assert fetch(NAME, server.url).read_bytes() == CONTENT
    (cache_dir() / "conv.csv").write_bytes(b"short")
    with pytest.raises(BiscaleError, match="not in the cache yet"):
        load_named(NAME)


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404 Not Found"), (500, "500 Internal Server Error")]
)
def test_http_errors(server, status, words):
    server.status = status
    with pytest.raises(
        BiscaleError, match=f"cannot fetch {server.url}/conv.csv: the server answered {words}"
    ):
        fetch(NAME, server.url)
    assert in_cache() == []


def test_refused_connection(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        BiscaleError, match=rf"cannot fetch http://127.0.0.1:{port}/conv.csv: .*refused"
    ):
        fetch(NAME, f"http://127.0.0.1:{port}")


def test_other_schemes_and_names_are_refused(server, tmp_path):
    with pytest.raises(BiscaleError, match="must start with https"):
        fetch(NAME, f"file://{tmp_path}")
    with pytest.raises(
        BiscaleError, match="no public trace 'other' to fetch; known: azure-conv-2023"
    ):
        fetch("other", server.url)


def test_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BiscaleError, match=r"cannot write to the cache .*file"):
        fetch(NAME, server.url)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path / "traces"
    monkeypatch.delenv("BISCALE_CACHE")
    assert "biscale-env" in str(cache_dir())


def test_a_file_without_known_size_is_fetched_and_read(server):
    server.content = MOONCAKE
    seen = []
    path = fetch(UNKNOWN, server.url, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == MOONCAKE
    assert seen[-1] == (len(MOONCAKE), len(MOONCAKE))
    assert load_named(UNKNOWN).prompt_tokens.tolist() == list(range(1, 51))
    assert fetch(UNKNOWN, server.url) == path
    assert len(server.requests) == 1
    assert in_cache() == ["mooncake.jsonl"]


def test_it_is_continued_while_the_server_has_the_same_version(server):
    server.content, server.version, server.cut_after = MOONCAKE, '"v1"', 900
    with pytest.raises(BiscaleError, match=f"broke off after 900 of {len(MOONCAKE)} bytes"):
        fetch(UNKNOWN, server.url)
    server.cut_after = None
    assert fetch(UNKNOWN, server.url).read_bytes() == MOONCAKE
    assert [wanted for _, wanted in server.requests] == [None, "bytes=900-"]
    assert in_cache() == ["mooncake.jsonl"]


def test_halves_of_two_versions_are_never_put_together(server):
    server.content, server.version, server.cut_after = MOONCAKE, '"v1"', 900
    with pytest.raises(BiscaleError, match="broke off"):
        fetch(UNKNOWN, server.url)
    newer = MOONCAKE.replace(b'"output_length": 5', b'"output_length": 7')
    server.content, server.version, server.cut_after = newer, '"v2"', None
    assert fetch(UNKNOWN, server.url).read_bytes() == newer
    # without a mark of the version nothing is continued
    (cache_dir() / "mooncake.jsonl").unlink()
    server.version, server.cut_after = None, 900
    with pytest.raises(BiscaleError, match="broke off"):
        fetch(UNKNOWN, server.url)
    server.cut_after = None
    assert fetch(UNKNOWN, server.url).read_bytes() == newer
    assert server.requests[-1][1] is None


def test_a_part_that_is_whole_or_too_long_already(server):
    server.content, server.version = MOONCAKE, '"v1"'
    cache_dir().mkdir(parents=True)
    (cache_dir() / "mooncake.jsonl.part-version").write_text('"v1"')
    (cache_dir() / "mooncake.jsonl.part").write_bytes(MOONCAKE)
    assert fetch(UNKNOWN, server.url).read_bytes() == MOONCAKE
    (cache_dir() / "mooncake.jsonl").unlink()
    (cache_dir() / "mooncake.jsonl.part-version").write_text('"v1"')
    (cache_dir() / "mooncake.jsonl.part").write_bytes(MOONCAKE + b"more")
    assert fetch(UNKNOWN, server.url).read_bytes() == MOONCAKE


def test_two_downloads_of_one_file_do_not_meet(server):
    with lock(cache_dir().with_name(f"fetch-{NAME}.lock")):
        with pytest.raises(BiscaleError, match=f"the download of {NAME} is in use by another"):
            fetch(NAME, server.url)
        assert server.requests == []
        server.content = MOONCAKE
        assert fetch(UNKNOWN, server.url).read_bytes() == MOONCAKE  # another file may come
    server.content = CONTENT
    assert fetch(NAME, server.url).read_bytes() == CONTENT


def test_a_page_in_place_of_the_file_is_deleted(server):
    server.content = b"<html>log in first</html>"
    with pytest.raises(BiscaleError, match=r"mooncake.jsonl is no trace .*deleted"):
        fetch(UNKNOWN, server.url)
    assert in_cache() == []


def test_a_server_that_does_not_say_how_long_the_file_is(server):
    server.content, server.says_length = MOONCAKE, False
    seen = []
    fetch(UNKNOWN, server.url, lambda done, total: seen.append(total))
    assert set(seen) == {None}


def test_a_disk_that_is_too_small_is_told_before(server, monkeypatch):
    import shutil

    small = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("biscale_env.traces.partial_file.shutil.disk_usage", lambda _: small)
    with pytest.raises(BiscaleError, match=r"has 0 MB left, but conv.csv needs 0 MB more"):
        fetch(NAME, server.url)
    assert in_cache() == []


def test_a_large_file_never_lies_in_memory(server):
    row = '{"timestamp": %d, "input_length": 9, "output_length": 5, "hash_ids": [7]}\n'
    server.content = "".join(row % (30 * k) for k in range(400_000)).encode()
    assert len(server.content) > 30e6
    tracemalloc.start()
    fetch(UNKNOWN, server.url)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < len(server.content) / 3


def test_shipped_list_matches_the_real_files(shared_data):
    files = load_downloads().files
    assert set(files) == {f"azure-{s}-{y}" for s in ("conv", "code") for y in (2023, 2024)} | {
        f"mooncake-{kind}" for kind in ("conversation", "toolagent", "synthetic")
    }
    synthetic = shared_data / "traces" / "mooncake_synthetic_trace.jsonl"
    entry = files["mooncake-synthetic"]
    assert (entry.size_bytes, entry.sha256) == (
        synthetic.stat().st_size,
        hashlib.sha256(synthetic.read_bytes()).hexdigest(),
    )
    assert len(read_trace(synthetic)) == entry.requests
    for service in ("conv", "code"):
        path = shared_data / "traces" / f"AzureLLMInferenceTrace_{service}_2023.csv"
        entry = files[f"azure-{service}-2023"]
        assert (entry.size_bytes, entry.sha256) == (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        assert entry.url.startswith("https://")
