"""A proxy in front of a real S3 server that injects the faults of networks and overloaded servers.

Each fault is drawn independently for every request, from a seed, at its own rate:

    refused    the server never sees the request; the response is 500, 503 or 429
    lost       the server carries out the request, and the connection ends before the response
    torn       the connection ends in the middle of the request's body, or of the response's
    slow       the response comes seconds late
    doubled    the server gets the request twice, and the second response is returned
    stale      a listing shows the state of some requests ago
    flipped    a bit of the request's body changes on its way

Host header and path reach the server as the client signed them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

FAULTS = ("refused", "lost", "torn", "slow", "doubled", "stale", "flipped")
_HOP = {"transfer-encoding", "connection", "keep-alive", "expect", "content-length", "content-encoding-hop"}
_REFUSALS = ((500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable"), (429, "TooManyRequests"))


class FaultProxy:
    """The proxy. `rates` maps faults to probabilities.

    Counts: `happened` the faults, `requests` all requests, `writing` those with a body that still wait for the server.
    """

    def __init__(self, target: str, rates: dict[str, float], seed: int = 0, slow_seconds: float = 1.0) -> None:
        assert rates.keys() <= set(FAULTS), rates
        self.target, self.rates, self.slow_seconds = target, rates, slow_seconds
        self.happened: Counter[str] = Counter()
        self.requests = self.writing = 0
        self.endpoint = ""
        self._draw = random.Random(seed)
        self._listings: dict[str, deque[tuple[int, dict[str, str], bytes]]] = {}

    def _strikes(self, fault: str) -> bool:
        if self._draw.random() >= self.rates.get(fault, 0.0):
            return False
        self.happened[fault] += 1
        return True

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except aiohttp.ClientError:  # the server is down at the moment
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        assert request.transport is not None
        if self._strikes("refused"):
            await request.read()
            status, code = self._draw.choice(_REFUSALS)
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>"
            return web.Response(status=status, text=body, content_type="application/xml")
        if request.method == "PUT" and self._strikes("torn"):
            await request.content.read(100)
            request.transport.abort()
            return web.Response(status=500)
        body = await request.read()
        if body and self._strikes("flipped"):
            at = self._draw.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if self._strikes("slow"):
            await asyncio.sleep(self.slow_seconds * self._draw.random())
        listing = request.method == "GET" and "list-type=2" in request.query_string
        known = self._listings.setdefault(request.path_qs, deque(maxlen=3))
        if listing and known and self._strikes("stale"):
            status, headers, found = known[0]
            return web.Response(status=status, headers=headers, body=found)
        if self._strikes("doubled"):
            await self._forward(request, body)
        status, headers, found = await self._forward(request, body)
        if listing and status == 200:
            known.append((status, headers, found))
        if self._strikes("lost"):
            request.transport.abort()
            return web.Response(status=500)
        if len(found) > 1 and request.method == "GET" and self._strikes("torn"):
            response = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(found))})
            await response.prepare(request)
            await response.write(found[: self._draw.randrange(1, len(found))])
            request.transport.abort()
            return response
        if request.method == "HEAD":
            return web.Response(status=status, headers=headers)
        return web.Response(status=status, headers=headers, body=found)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.writing += bool(body)
        try:
            return await self._ask(request, body)
        finally:
            self.writing -= bool(body)

    async def _ask(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = URL(self.target + request.raw_path, encoded=True)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False,
            skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
        ) as reply:  # fmt: skip
            found = await reply.read()
            keep = _HOP - {"content-length"} if request.method == "HEAD" else _HOP
            return reply.status, {n: v for n, v in reply.headers.items() if n.lower() not in keep}, found

    async def _serve(self, ready: threading.Event, over: asyncio.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as self._session:
            application = web.Application(client_max_size=2**40)
            application.router.add_route("*", "/{rest:.*}", self._handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            self.endpoint = f"http://127.0.0.1:{port}"
            ready.set()
            await over.wait()
            await runner.cleanup()


@contextlib.contextmanager
def fault_proxy(target: str, rates: dict[str, float], seed: int = 0, **more: Any) -> Iterator[FaultProxy]:
    """Run a proxy in front of `target`. Its `endpoint` is the address for clients."""
    proxy = FaultProxy(target, rates, seed, **more)
    ready, loop, over = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy._serve(ready, over)), daemon=True)
    thread.start()
    assert ready.wait(20), "the fault proxy did not start"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
