"""Requests to an OpenAI-compatible server: what may pass is tried again, what fails for good says why."""

import json
import random
import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from mllm_srec.errors import ModelError
from mllm_srec.mllm.replies import Reply, RequestError, read_reply

TRIES = 5
PASSING = frozenset((408, 429, 500, 502, 503, 504))
"""Statuses that another try may not meet again."""
OF_THE_ROW = PASSING | {400, 413, 422}
"""Statuses that one request may cause; all others mean that the server, the key or the model's name is wrong."""
BACKOFF, MAX_WAIT = 0.5, 60.0
"""Seconds: before the second try, doubled at each further one; the longest Retry-After that is obeyed."""
CONNECT = 10.0
"""Seconds at most that a connection may take."""


class ChatServer:
    """One server, one key. May be used by several threads."""

    def __init__(
        self, url: str, key: str, connections: int, timeout: float, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the server; a trailing /v1 may stand there.
            key: sent as bearer token where there is one, never shown.
            connections: open at once at most.
            timeout: seconds without a sign of the server before a try counts as failed.
            sleep: waits between tries.

        Raises:
            ModelError: the key cannot stand in a header.
        """
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ModelError("the server's key has spaces, line breaks or characters beyond ASCII: copy it again")
        self._key, self._sleep, self._random = key, sleep, random.Random()
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def models(self, tries: int = TRIES) -> list[dict[str, Any]]:
        """What the server serves: entries with `id` and whatever else it says of a model.

        Raises:
            ModelError: no answer, not this key, or no list; it names the address.
        """
        try:
            served = self.send("GET", "/v1/models", tries=tries).get("data")
        except RequestError as failure:
            raise ModelError(f"{self.url}: {failure}: {failure.advice or 'check model.server'}") from None
        if not isinstance(served, list) or not all(
            isinstance(e, dict) and isinstance(e.get("id"), str) for e in served
        ):
            raise ModelError(f"{self.url}/v1/models is not a list of models: check model.server")
        return served

    def chat(self, body: dict[str, Any]) -> Reply:
        """The reply to a chat completions request.

        Raises:
            RequestError: there is none.
        """
        return read_reply(self.send("POST", "/v1/chat/completions", body))

    def send(self, method: str, path: str, body: dict[str, Any] | None = None, tries: int = TRIES) -> dict[str, Any]:
        """The JSON object that answers.

        Raises:
            RequestError: the last try failed, or what came is no such object.
        """
        failure, asked = RequestError("not sent"), 0.0
        for attempt in range(tries):
            if attempt:
                backoff = BACKOFF * 2 ** (attempt - 1) * self._random.uniform(1, 2)
                self._sleep(max(backoff, min(asked, MAX_WAIT)))
            try:
                response = self._client.request(method, path, json=body)
            except httpx2.RequestError as error:
                reason = self._shown(f"no answer ({type(error).__name__}: {error})")
                failure, asked = RequestError(reason, "connection", "start the server, or correct model.server"), 0.0
                continue
            if response.status_code == 200:
                return self._object(response)
            failure, asked = self._refusal(response), _retry_after(response.headers.get("retry-after", ""))
            if response.status_code not in PASSING:
                break
        raise failure

    def _object(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            value = response.json()
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RequestError(f"the reply is no JSON object: {self._shown(response.text)!r}")
        if value.get("error"):
            raise RequestError(f"the server reports an error: {self._shown(_message(value))}")
        return value

    def _refusal(self, response: httpx2.Response) -> RequestError:
        try:
            said = _message(response.json())
        except (ValueError, RecursionError):
            said = response.text
        status = response.status_code
        reason = f"HTTP {status}: {self._shown(said)}" if said.strip() else f"HTTP {status}"
        if status in OF_THE_ROW:
            return RequestError(reason)
        advice = {
            401: "set the environment variable that model.api_key_variable names to the server's key",
            403: "the key that model.api_key_variable names may not use this model",
            404: "",  # the names that are served say more
        }
        return RequestError(reason, "server", advice.get(status, "check model.server"))

    def _shown(self, text: str) -> str:
        """Words of the server as they may stand in an error: short, in one line, without the key."""
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 300 else text[:300] + " ..."


def _message(value: Any) -> str:
    """The message in a server's error object, whichever of the usual shapes it has."""
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as an HTTP date; 0 if it cannot be read."""
    try:
        if value.strip().isdecimal():
            return float(value)
        moment = parsedate_to_datetime(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
