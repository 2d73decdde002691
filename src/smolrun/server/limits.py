"""How much a client may ask for, and how long it may take. Every limit of the server is here.

Limits of sampling (stop strings, logprobs, biases) are the engine's own: `engine/sampling.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    # One request.
    body_bytes: int = 2_000_000  # 413 above
    header_bytes: int = 65_536  # request line and headers together; 431 above
    header_fields: int = 256  # 431 above
    json_depth: int = 64  # of nested arrays and objects; the outermost is 1
    choices: int = 8  # `n`
    prompts: int = 64  # of one request to /v1/completions; times `n`, places in the queue
    score_choices: int = 256  # of one request to /v1/score
    embedding_inputs: int = 256  # texts of one request to /v1/embeddings
    # All requests.
    queued_requests: int = 64  # that wait beside those that run; 429 above
    queued_tokens: int = 262_144  # prompt tokens of those that wait; 429 above
    side_requests: int = 64  # to /tokenize, /v1/score and such, at a time; 429 above
    connections: int = 1024  # closed unanswered above
    # Times.
    header_seconds: float = 10.0  # from a connection's first byte to the end of the headers
    body_seconds: float = 30.0  # from there to the end of the body; 408 above
    idle_seconds: float = 15.0  # between two requests of a connection
    write_seconds: float = 30.0  # that a client may take nothing of what was written for it
    total_seconds: float = 600.0  # of one answer, its wait included; 504 above
    queue_seconds: float = 120.0  # of which it may wait; 503 above
    drain_seconds: float = 30.0  # for answers under way when the server is told to end
    ping_seconds: float = 15.0  # of silence in a stream, after which a comment is sent
