"""An OpenAI-compatible endpoint: where it may be, and one reply of it."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lorafit.errors import LorafitError, MissingError, ModelError, UsageError, printable
from lorafit.evaluate.judge.prompt import PROMPT
from lorafit.evaluate.judge.types import Judge

TRIES = 3
_LARGEST_REPLY = 4_000_000  # bytes
_LONGEST_WAIT = 60.0  # seconds that an endpoint may ask for between two tries


@dataclass(frozen=True)
class Endpoint:
    judge: Judge
    url: str
    key: str | None = field(repr=False)
    opener: urllib.request.OpenerDirector = field(repr=False)

    def error(self, kind: type[LorafitError], what: str, said: bytes = b"") -> LorafitError:
        text = said.decode("utf-8", "replace")
        if self.key:
            text, what = text.replace(self.key, "[key]"), what.replace(self.key, "[key]")
        text = printable(" ".join(text.split()))[:200]
        return kind(f"eval.judge: {self.url} {printable(what)}{': ' + text if text else ''}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A question that is sent on would take the key, or lose its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


def endpoint_of(judge: Judge) -> Endpoint:
    prompt = judge.prompt or PROMPT
    for place in ("{first}", "{second}"):
        if place not in prompt:
            raise UsageError(f"eval.judge.prompt: has no {place}, so the judge would not see that answer")
    key = _key(judge.api_key_env) if judge.api_key_env else None
    is_local = _check_address(judge, key)
    # A proxy would read what goes to this machine in the clear.
    proxies = urllib.request.ProxyHandler({} if is_local else None)
    url = f"{judge.base_url.rstrip('/')}/chat/completions"
    return Endpoint(judge, url, key, urllib.request.build_opener(proxies, _NoRedirects))


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MissingError(f"eval.judge.api_key_env: the environment variable {variable} is not set or empty")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(f"eval.judge.api_key_env: what {variable} holds is no key: a key has no spaces or line breaks")
    return key


def _check_address(judge: Judge, key: str | None) -> bool:
    """Whether it is on this machine or in a private network. Raises UsageError if it may not be asked."""
    where = "eval.judge.base_url"
    try:
        parts = urlsplit(judge.base_url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise UsageError(f"{where}: is no URL, such as http://localhost:8000/v1") from None
    if "@" in parts.netloc:
        raise UsageError(f"{where}: has a user or password in it; name a variable in eval.judge.api_key_env instead")
    is_plain = judge.base_url.isascii() and judge.base_url.isprintable() and " " not in judge.base_url
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not is_plain:
        raise UsageError(f"{where}: is {printable(judge.base_url)}, and has to be as http://localhost:8000/v1")
    is_local = _is_private(host)
    if parts.scheme == "http" and not is_local and (key or not judge.insecure):
        what = "the key" if key else "questions and answers"
        raise UsageError(f"{where}: {what} would go to {printable(host)} unencrypted; use https://")
    return is_local


def _is_private(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def ask(endpoint: Endpoint, question: str, sleep: Callable[[float], None]) -> str:
    """The judge's reply."""
    judge = endpoint.judge
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "seed": 0,
        "max_tokens": judge.max_tokens,
    }
    request = urllib.request.Request(
        endpoint.url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "lorafit"},
    )
    if endpoint.key:
        request.add_unredirected_header("Authorization", f"Bearer {endpoint.key}")
    for number in range(1, TRIES + 1):
        try:
            with endpoint.opener.open(request, timeout=judge.timeout) as response:
                return _reply(endpoint, response.read(_LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            if number == TRIES or not (error.code == 429 or error.code >= 500):
                raise _refused(endpoint, error) from None
            sleep(_wait(number, error.headers.get("Retry-After")))
        except TimeoutError:
            raise _too_slow(endpoint) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _too_slow(endpoint) from None
            raise endpoint.error(ModelError, f"can't be reached ({reason or type(reason).__name__})") from None
    raise AssertionError("the last try returns or raises")


def _wait(number: int, asked: str | None) -> float:
    """Seconds before the next try."""
    return min(float(asked), _LONGEST_WAIT) if asked and asked.isdecimal() else float(2 ** (number - 1))


def _too_slow(endpoint: Endpoint) -> LorafitError:
    return endpoint.error(ModelError, f"did not reply in {endpoint.judge.timeout:g} s (eval.judge.timeout)")


def _refused(endpoint: Endpoint, error: urllib.error.HTTPError) -> LorafitError:
    judge, code = endpoint.judge, error.code
    try:
        said = error.read(_LARGEST_REPLY)
    except (OSError, http.client.HTTPException):
        said = b""
    if code in (401, 403):
        hint = f"the key in {judge.api_key_env} is refused" if endpoint.key else "set eval.judge.api_key_env"
        return endpoint.error(UsageError, f"answers {code}; {hint}", said)
    if 300 <= code < 400:
        to = urlsplit(error.headers.get("Location") or "").netloc.rpartition("@")[2] or "elsewhere"
        return endpoint.error(UsageError, f"answers {code}, a redirect to {to}, and is not followed")
    if code == 404:
        return endpoint.error(UsageError, f"answers 404; check eval.judge.base_url and model {judge.model!r}", said)
    tries = f" after {TRIES} tries" if code == 429 or code >= 500 else ""
    return endpoint.error(ModelError, f"answers {code}{tries}", said)


def _reply(endpoint: Endpoint, body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise endpoint.error(ModelError, "answers with something that is no chat completion", body) from None
    return content if isinstance(content, str) else ""
