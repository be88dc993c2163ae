"""Stream a remote file piece by piece, and retry if a fault may be temporary."""

import http.client
import os
import queue
import select
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec

from data.errors import DamagedShardError, DataError

PIECE_BYTES = 1 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0
_PASSING_HTTP_STATUS = (408, 425, 429)  # and every status from 500 on
T = TypeVar("T")


class FetchError(Exception):
    """A fetch failed; a retry may help."""


class WrongContentError(FetchError):
    """The content that arrived is not the expected one."""


def with_retries(
    attempt: Callable[[], T],
    attempts: int,
    where: str,
    failure: str = "could not be fetched",
    remedy: str = "check the address and the network",
) -> T:
    """Return the result of `attempt`, which is repeated after a FetchError, with pauses that double.

    Args:
        attempt: The call.
        attempts: How often to try.
        where: What the error message calls the file.
        failure: What the error message says has failed.
        remedy: What the error message advises.

    Raises:
        DamagedShardError: The last attempt gave the wrong content.
        DataError: The last attempt failed in another way.
    """
    pause_s = _FIRST_PAUSE_S
    for left in reversed(range(attempts)):
        try:
            return attempt()
        except WrongContentError as error:
            if not left:
                raise DamagedShardError(
                    f"{where}: damaged at the source, fetched {attempts} times ({error}); copy or prepare it again"
                ) from error
        except FetchError as error:
            if not left:
                raise DataError(f"{where}: {failure} in {attempts} attempts ({error}); {remedy}") from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    raise AssertionError("attempts is at least 1")


def steady(pieces: Iterator[bytes], time_limit_s: float) -> Iterator[bytes]:
    """Yield the same pieces; raise FetchError if fewer than PIECE_BYTES arrive in `time_limit_s` seconds."""
    received, since = 0, time.monotonic()
    try:
        for piece in pieces:
            received += len(piece)
            if received >= PIECE_BYTES:
                received, since = 0, time.monotonic()
            elif time.monotonic() - since > time_limit_s:
                raise FetchError(f"only {received} bytes received in {time_limit_s} s")
            yield piece
    except OSError as error:
        raise FetchError(str(error)) from error


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to http or https only, and never from https to http, where others can read what is sent."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != old and (old, new) != ("http", "https"):
            raise ValueError(f"the server redirects from {old} to {new}, {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SameScheme)


def stream_http(address: str, name: str, time_limit_s: float) -> Iterator[bytes]:
    """Yield the body of `address`/`name`; raise FetchError if it is shorter than announced.

    The socket's time limit applies to each byte. Headers and chunk sizes may trickle in, so they get their own.
    """
    url = f"{address}/{quote(name)}"
    try:
        if not urlsplit(url).hostname:
            raise ValueError("it names no host")
        response = _within(time_limit_s, lambda: _OPENER.open(url, timeout=time_limit_s))
        announced, received = response.headers.get("Content-Length"), 0
        while piece := _next_piece(response, time_limit_s):
            received += len(piece)
            yield piece
        response.close()  # not in a `with`, which would wait for an abandoned read
    except FetchError:
        raise
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in _PASSING_HTTP_STATUS:
            raise DataError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
        raise FetchError(f"the server answers {error.code}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise DataError(f"{url}: not an address ({error}); correct it") from error
    except Exception as error:  # http.client raises many kinds when a connection breaks
        raise FetchError(f"{type(error).__name__}: {error}") from error
    if announced is not None and announced != str(received):
        raise FetchError(f"{received} of {announced} bytes received")


def _next_piece(response: http.client.HTTPResponse, time_limit_s: float) -> bytes:
    if not response.chunked:
        return response.read1(PIECE_BYTES)
    return _within(time_limit_s, lambda: response.read1(PIECE_BYTES))


def stream_fsspec(address: str, name: str, time_limit_s: float) -> Iterator[bytes]:
    """Yield the content of `address`/`name` through fsspec. Reads are timed, since not all stores limit them."""
    try:
        file = _within(time_limit_s, lambda: fsspec.open(f"{address}/{name}", "rb").open())
        while piece := _within(time_limit_s, lambda: file.read(PIECE_BYTES)):
            yield piece
        file.close()
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{address}/{name}: cannot be read ({error}); check the address") from error
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{address}: cannot be read here ({error}); name a folder, http(s)://, pipe: or a store that fsspec knows, "
            "and install its package"
        ) from error
    except (FetchError, OSError):
        raise
    except Exception as error:  # stores raise errors of their own: no credentials, no connection
        raise FetchError(f"{type(error).__name__}: {error}") from error


def stream_pipe(address: str, name: str, time_limit_s: float) -> Iterator[bytes]:
    """Yield the output of a "pipe:" command; raise FetchError on a non-zero exit status or a silence too long."""
    command = address.removeprefix("pipe:").replace("{}", shlex.quote(name))
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        while True:
            if not select.select([process.stdout], [], [], time_limit_s)[0]:
                raise FetchError(f"the command wrote nothing for {time_limit_s} s")
            piece = os.read(process.stdout.fileno(), PIECE_BYTES)
            if not piece:
                break
            yield piece
        status = process.wait(time_limit_s)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"the command did not end within {time_limit_s} s") from error
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        raise FetchError(f"the command ended with status {status}")


def _within(time_limit_s: float, call: Callable[[], T]) -> T:
    """Return the result of `call`, run in a daemon thread that is abandoned after `time_limit_s` seconds."""
    answer: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(_outcome(call)), daemon=True, name="fetch").start()
    try:
        outcome = answer.get(timeout=time_limit_s)
    except queue.Empty as error:
        raise FetchError(f"no data received for {time_limit_s} s") from error
    return outcome()


def _outcome(call: Callable[[], T]) -> Callable[[], T]:
    """Run `call`; return a function that returns or raises what it did."""
    try:
        result = call()
    except BaseException as error:
        failure = error

        def fail() -> T:
            raise failure

        return fail
    return lambda: result
