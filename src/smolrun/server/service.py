"""What all requests share: the model, its state, the queue, and the counts."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import smolrun
from smolrun.api import Model, Terms
from smolrun.api.asynchronous import AsyncModel, AsyncStream
from smolrun.engine.places import Place, Places
from smolrun.server.errors import ApiError, invalid, unavailable
from smolrun.server.limits import Limits
from smolrun.server.metrics import Metrics
from smolrun.server.schema import Generation
from smolrun.server.work import Work

T = TypeVar("T")
State = Literal["loading", "ready", "draining", "failed"]

logger = logging.getLogger("smolrun.server")


@dataclass(frozen=True)
class Settings:
    """What whoever starts a server decides."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # by which the model is asked for; none: what its files say
    cors_origins: tuple[str, ...] = ()
    parallel: int = 16  # answers that run side by side, in the model that is loaded
    limits: Limits = field(default_factory=Limits)


class Service:
    """One model behind HTTP. Used on the event loop's thread, but for `off_loop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.state: State = "loading"
        self.metrics = Metrics(self)
        self.side_places = Places()  # of requests that need no answer of the model
        self.side_places.limit = self.limits.side_requests
        self.created = int(time.time())
        self._model: AsyncModel | None = None
        self._works: weakref.WeakSet[Work] = weakref.WeakSet()
        # Templates and tokenizing: they hold the GIL for the most part, so more would not help.
        self._workers = ThreadPoolExecutor(2, "smolrun-prepare")

    def model(self, name: str | None = None) -> AsyncModel:
        """The model that a request asks for.

        Raises:
            ApiError: 503 while it loads or the server ends; 404 where it has another name.
        """
        if self.state == "draining":
            raise unavailable("The server is about to end; ask another.", "shutting_down")
        if self.state == "failed":
            raise unavailable("The model could not be loaded.", "load_failed", 30)
        if self._model is None:
            raise unavailable("The model is still being loaded; come back later.", "loading")
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"There is no model {name[:200]!r} here; there is {self.names[0]!r}.",
                "model_not_found",
                param="model",
            )
        return self._model

    def ready(self, model: Model) -> None:
        """The model is there; from now on requests are answered."""
        model.limit_queue(self.limits.queued_requests, self.limits.queued_tokens)
        model.loaded.engine.on_step = self.metrics.step_tokens.observe
        self._model = AsyncModel(model)
        if self.state == "loading":
            self.state = "ready"

    def prepare(self) -> None:
        """Have a thread do what the first structured request would wait for, if it can be done."""
        grammars = self.model().model.loaded.grammars
        if grammars is not None:
            self._workers.submit(grammars.prepare)  # its error is the request's, if one comes

    @property
    def names(self) -> Sequence[str]:
        """By which the model is asked for; the first is what replies call it."""
        if self.settings.names:
            return self.settings.names
        return (self._model.model.name,) if self._model is not None else ()

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints and seeds mean equal answers, on the same machine."""
        assert self._model is not None
        loaded = self._model.model.loaded
        identity = f"{loaded.name} {loaded.path and loaded.path.name} {loaded.config}"
        short = hashlib.sha256(identity.encode()).hexdigest()[:10]
        return f"smolrun-{smolrun.__version__}-{short}"

    def terms(self, body: Generation, client: str, count: int, param: str = "n") -> list[Terms]:
        """Terms for so many answers, each with a place that is taken before anything is computed.

        Args:
            body: the request.
            client: whose it is; clients take turns, and share no cache.
            count: answers.
            param: the field that says how many there are.

        Raises:
            ApiError: 400, there are never so many places. QueueFullError: there are not now.
        """
        model = self.model().model
        places = model.loaded.engine.max_sequences + self.limits.queued_requests
        if count > places:
            raise invalid(param, f"{count} answers, and there are {places} places")
        salt = os.urandom(16) if body.cache_prompt is False else client.encode()
        return [
            Terms(client, salt, self.limits.queue_seconds, self.limits.total_seconds, place)
            for place in model.reserve(count)
        ]

    def reading_terms(self, client: str, place: Place | None = None) -> Terms:
        """Terms for texts of a client that are only read; see `terms`."""
        limits = self.limits
        return Terms(client, client.encode(), limits.queue_seconds, limits.total_seconds, place)

    def work(self, streams: Sequence[AsyncStream], terms: Sequence[Terms], choices: int) -> Work:
        """Streams that are not started, `choices` of each prompt, as one piece of work."""
        self.metrics.choices.observe(choices)
        work = Work(self.limits.ping_seconds, self.metrics, streams, terms, choices)
        self._works.add(work)
        return work

    @property
    def places_taken(self) -> int:
        """Requests under way."""
        return self.side_places.taken + self.statistics().get("places_taken", 0)

    def abort(self) -> None:
        """End all answers with an error."""
        for work in list(self._works):
            work.abort(unavailable("The server has ended.", "shutting_down"))

    async def off_loop(self, function: Callable[[], T]) -> T:
        """Run what takes long on a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    async def aside(self, function: Callable[[], T]) -> T:
        """The same for requests that need no answer of the model; there may be so many of them."""
        with self.side_places.take()[0]:
            return await self.off_loop(function)

    def statistics(self) -> dict[str, int]:
        """Counts of the engine; nothing while it loads."""
        return {} if self._model is None else self._model.model.statistics()

    def close(self) -> None:
        """Stop the model."""
        self._workers.shutdown(wait=False)
        if self._model is not None:
            self._model.model.close()

    async def drained(self) -> bool:
        """Wait until the last answer has gone out; False where that takes longer than it may."""
        deadline = time.monotonic() + self.limits.drain_seconds
        while self.places_taken:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def properties(self) -> dict[str, Any]:
        """What `/props` tells."""
        model = self.model().model
        sampling = model.default_sampling
        template = model.loaded.template
        thinks = template is not None and template.supports_thinking
        return {
            "model_alias": self.names[0],
            "n_ctx": model.context_size,
            "total_slots": model.loaded.engine.max_sequences,
            "build_info": f"smolrun {smolrun.__version__}",
            "system_fingerprint": self.fingerprint,
            "chat_template": template.source if template else None,
            "default_generation_settings": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_penalty": sampling.repeat_penalty,
            },
            "thinking": {"values": [True, False] if thinks else [False], "default": thinks},
            "tools": template is not None and template.supports_tools,
            "notes": list(model.notes),
        }
