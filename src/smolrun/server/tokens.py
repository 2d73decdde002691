"""Text to token ids and back, what the template makes of messages, how likely texts are."""

from __future__ import annotations

import base64
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from smolrun.server import replies
from smolrun.server.endpoint import client_of, json_reply, prompts_of, read_body
from smolrun.server.errors import invalid
from smolrun.server.fields import thinking_of
from smolrun.server.schema import (
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)
from smolrun.server.service import Service
from smolrun.server.work import while_connected
from smolrun.text import thinking as text_thinking


async def tokenize(request: Request, service: Service) -> Response:
    """Token ids of a text, or of what the model is given for a conversation."""
    raw, body = await read_body(request, service, TokenizeRequest)
    model = service.model(body.model).model
    given = {
        name: raw[name] for name in ("content", "prompt", "messages") if raw.get(name) is not None
    }
    if len(given) != 1:
        raise invalid("content", "expected exactly one of content, prompt and messages")
    ((name, value),) = given.items()

    def run() -> dict[str, Any]:
        if name == "messages":
            ids = model.template.encode(value)
        else:
            ids = model.tokenize(value, parse_special=body.parse_special)
        tokens: list[Any] = list(ids)
        if body.with_pieces:
            token_bytes = model.tokenizer.token_bytes
            tokens = [{"id": i, "piece": replies.token_name(token_bytes(i))} for i in ids]
        return {"tokens": tokens, "count": len(ids), "max_model_len": model.context_size}

    return json_reply(await service.aside(run))


async def detokenize(request: Request, service: Service) -> Response:
    """The text of token ids."""
    _, body = await read_body(request, service, DetokenizeRequest)
    model = service.model(body.model).model
    text = await service.aside(lambda: model.detokenize(body.tokens))
    return json_reply({"content": text, "prompt": text})


async def apply_template(request: Request, service: Service) -> Response:
    """The text that the model is given for a conversation."""
    raw, body = await read_body(request, service, TemplateRequest)
    model = service.model(body.model).model
    enabled = text_thinking.thinking_of(**thinking_of(body, body.chat_template_kwargs)).enabled
    given = raw.get("chat_template_kwargs") or {}
    arguments = {k: v for k, v in given.items() if k != "enable_thinking" and v is not None}

    def run() -> str:
        return model.template.render(
            raw["messages"],
            tools=raw.get("tools"),
            enable_thinking=enabled,
            add_generation_prompt=body.add_generation_prompt,
            continue_final=body.continue_final_message,
            template_arguments=arguments,
        )

    return json_reply({"prompt": await service.aside(run)})


async def embeddings(request: Request, service: Service) -> Response:
    """A vector of length 1 for each text: the mean of the last hidden states."""
    raw, body = await read_body(request, service, EmbeddingRequest)
    model = service.model(body.model)
    size = model.model.config.hidden_size
    if body.dimensions not in (None, size):
        raise invalid("dimensions", f"this model's vectors have {size}")
    inputs = prompts_of(raw["input"])

    def encoded() -> list[list[int]]:
        tokenize = model.model.tokenize
        return [tokenize(text) if isinstance(text, str) else text for text in inputs]

    ids = await service.aside(encoded)
    terms = service.reading_terms(client_of(request))
    data = []
    # A few at a time: each has a place in the queue.
    most = model.model.loaded.engine.max_sequences
    for start in range(0, len(ids), most):
        batch = ids[start : start + most]
        vectors = await while_connected(request, model.embed(batch, terms=terms))
        for index, vector in enumerate(vectors, start):
            value: Any = vector.tolist()
            if body.encoding_format == "base64":
                value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
    count = sum(map(len, ids))
    return json_reply(
        {
            "object": "list",
            "data": data,
            "model": body.model or service.names[0],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


async def score(request: Request, service: Service) -> Response:
    """Log-probabilities of continuations of a prompt."""
    _, body = await read_body(request, service, ScoreRequest)
    model = service.model(body.model)
    with service.side_places.take()[0]:
        terms = service.reading_terms(client_of(request))
        scoring = model.score(body.prompt, body.choices, terms=terms)
        scores = await while_connected(request, scoring)
    data = [
        {
            "object": "score",
            "index": index,
            "logprob": replies.logprob(one.logprob),
            "token_logprobs": [replies.logprob(value) for value in one.token_logprobs],
            "greedy": one.greedy,
        }
        for index, one in enumerate(scores)
    ]
    name = body.model or service.names[0]
    return json_reply({"object": "list", "model": name, "data": data})
