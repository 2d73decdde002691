"""Answers as clients know them: shapes, streams, log-probabilities, several at once."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest

from smolrun.errors import NonFiniteError

from .running import CHAT, GREEDY, Running, chunks_of, slowed

LONG: dict[str, Any] = {**GREEDY, "max_tokens": 40, "ignore_eos": True}
TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip


def streamed(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    with server.client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        return chunks_of(reply)


def joined(chunks: list[Any], name: str = "content", index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get(name) or "" for c in choices)


def test_a_whole_answer(server: Running) -> None:
    reply = server.post(CHAT, LONG).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "tiny"
    assert reply["system_fingerprint"].startswith("smolrun-")
    (choice,) = reply["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 40
    assert usage["total_tokens"] == usage["prompt_tokens"] + 40
    assert usage["completion_tokens_details"].keys() == {"reasoning_tokens"}
    again = server.post(CHAT, LONG).json()
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert set(again["timings"]) == TIMINGS
    assert again["timings"]["cache_n"] == cached
    assert again["timings"]["prompt_n"] + cached == usage["prompt_tokens"]
    assert again["timings"]["predicted_n"] == 40


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream(server: Running, include_usage: bool) -> None:  # STR-04
    whole = server.post(CHAT, {**LONG, "logprobs": True, "top_logprobs": 2}).json()
    body = {**LONG, "logprobs": True, "top_logprobs": 2}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    chunks = streamed(server, CHAT, body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("role" in c["delta"] for chunk in chunks[1:] for c in chunk["choices"])
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert set(chunks[-1]["timings"]) == TIMINGS
    message = whole["choices"][0]["message"]
    assert joined(chunks) == message["content"]
    assert joined(chunks, "reasoning_content") == message.get("reasoning_content", "")
    tokens = [
        token
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in tokens)
    assert data.decode("utf-8", "replace") == message["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_no_character_is_cut(server: Running) -> None:  # STR-01
    """An answer that must be this text, ended after each of its tokens, which are bytes."""
    text = "👍🏽中文e\u0301🇩🇰"
    body = {**GREEDY, "think": False, "choices": [text], "max_tokens": 100}
    whole = server.post(CHAT, body).json()
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["usage"]["completion_tokens"] > len(text)
    for count in range(1, whole["usage"]["completion_tokens"] + 1):
        body["max_tokens"] = count
        cut = server.post(CHAT, body).json()["choices"][0]["message"]["content"]
        lines = server.post(CHAT, {**body, "stream": True}).content.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert joined(chunks) == cut
        assert text.startswith(cut.rstrip("\ufffd"))
        assert "\ufffd" not in joined(chunks[:-2])  # only what the end cut off


def test_reasoning_is_apart(server: Running) -> None:
    think = server.model.tokenizer.id_of("<think>")
    close = server.model.tokenizer.id_of("</think>")
    # A bias of 100 opens the reasoning at once, and never closes it.
    body = {**LONG, "logit_bias": {str(close): -100}, "messages": GREEDY["messages"]}
    opened = {**body, "logit_bias": {str(think): 100}, "max_tokens": 5}
    reply = server.post(CHAT, opened).json()
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    off = server.post("/apply-template", {"messages": GREEDY["messages"], "think": False}).json()
    assert off["prompt"].endswith("<think>\n\n</think>\n")
    for fields in (
        {"think": False}, {"reasoning_effort": "none"}, {"thinking_budget": 0},
        {"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": {"type": "disabled"}},
        {"reasoning": {"effort": "none"}}, {"reasoning_budget_tokens": 0},
        {"thinking_token_budget": 0, "think": False}, {"think": "none"},
    ):  # fmt: skip
        reply = server.post(CHAT, {**GREEDY, **fields}).json()
        rendered = server.post("/tokenize", {"content": off["prompt"]}).json()
        assert reply["usage"]["prompt_tokens"] == rendered["count"], fields


def test_several_answers(server: Running) -> None:
    body = {**LONG, "temperature": 1, "seed": 2**64 - 2, "n": 3}
    reply = server.post(CHAT, body).json()
    texts = [json.dumps(choice["message"]) for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert reply["usage"]["completion_tokens"] == 120
    chunks = streamed(server, CHAT, body)
    for index, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = server.post(CHAT, {**body, "n": 1, "seed": seed}).json()
        assert json.dumps(alone["choices"][0]["message"]) == texts[index]
        assert joined(chunks, index=index) == alone["choices"][0]["message"]["content"]
        assert reply["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]


def test_stop_strings(server: Running) -> None:
    whole = server.post("/v1/completions", {"prompt": "The", **plain(40)}).json()
    text = whole["choices"][0]["text"]
    stop = text[10:13]
    reply = server.post("/v1/completions", {"prompt": "The", **plain(40), "stop": stop}).json()
    assert reply["choices"][0]["text"] == text[: text.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    body = {"prompt": "The", **plain(40), "stop": [stop, "never"]}
    chunks = streamed(server, "/v1/completions", body)
    assert (
        "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == text[: text.index(stop)]
    )


def plain(count: int) -> dict[str, Any]:
    return {"max_tokens": count, "temperature": 0, "ignore_eos": True}


def test_prompts_of_every_kind(server: Running) -> None:
    texts = ["The sky", "A small model"]
    ids = [server.post("/tokenize", {"content": text}).json()["tokens"] for text in texts]
    alone = [server.model.generate(text, **plain(6)).text for text in texts]
    for prompt, expected in (
        (texts[0], alone[:1]), (texts, alone), (ids[0], alone[:1]), (ids, alone),
        ([texts[1]], alone[1:]),
    ):  # fmt: skip
        reply = server.post("/v1/completions", {"prompt": prompt, **plain(6)}).json()
        assert [choice["text"] for choice in reply["choices"]] == expected
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(expected)))
    body = {"prompt": texts, **plain(6), "n": 2, "best_of": 2, "echo": True}
    reply = server.post("/v1/completions", body).json()
    assert [c["text"] for c in reply["choices"]] == [
        text + answer for text, answer in zip(texts, alone, strict=True) for _ in range(2)
    ]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_echo_with_logprobs(server: Running, as_ids: bool, count: int) -> None:
    """As lm-eval's local-completions reads it."""
    text = "The sky is blue, 中文 and 👍!"
    ids = server.model.tokenize(text)
    body = {"prompt": ids if as_ids else text, "echo": True, "logprobs": 3, **plain(count)}
    reply = server.post("/v1/completions", body).json()
    (choice,) = reply["choices"]
    assert choice["text"].startswith(text)
    found = choice["logprobs"]
    assert {len(values) for values in found.values()} == {len(ids) + count}
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    scores = server.model.score(ids[:1], [ids[1:]])[0].token_logprobs
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(scores, abs=1e-6)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
    ]
    assert all(greedy[len(ids) - 1 :])  # what the model wrote itself
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
    chunks = streamed(server, "/v1/completions", body)
    choices = [c for chunk in chunks for c in chunk["choices"]]
    assert "".join(c["text"] for c in choices) == choice["text"]
    for name, values in found.items():
        assert sum((c["logprobs"][name] for c in choices if c["logprobs"]), []) == values


def test_score(server: Running) -> None:
    choices = [" blue", " green"]
    reply = server.post("/v1/score", {"prompt": "The sky is", "choices": choices}).json()
    expected = server.model.score("The sky is", choices)
    assert [one["logprob"] for one in reply["data"]] == [one.logprob for one in expected]
    assert [one["greedy"] for one in reply["data"]] == [one.greedy for one in expected]
    assert server.post("/v1/score", {"prompt": "a", "choices": []}).status_code == 400
    assert server.post("/v1/score", {"prompt": [1], "choices": ["a"]}).status_code == 400


def test_embeddings(server: Running) -> None:
    texts = ["The sky is blue", "A small model", "a", "b c", "d"]
    expected = server.model.embed(texts)
    ids = [server.model.tokenize(text) for text in texts]
    several: list[Any] = [texts, ids]
    for given in several:
        reply = server.post("/v1/embeddings", {"input": given}).json()
        assert [one["index"] for one in reply["data"]] == list(range(5))
        found = np.array([one["embedding"] for one in reply["data"]], np.float32)
        assert (found == expected).all()
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    for given in (several[0][0], several[1][0]):
        body = {"input": given, "encoding_format": "base64", "dimensions": expected.shape[1]}
        (one,) = server.post("/v1/embeddings", body).json()["data"]
        assert (np.frombuffer(base64.b64decode(one["embedding"]), "<f4") == expected[0]).all()
    refused: list[dict[str, Any]] = [
        {"input": ""}, {"input": []}, {"input": [""]}, {"input": [[]]}, {"input": [400]},
        {"input": ["a"] * 257}, {"input": "a", "dimensions": 7}, {"input": [5] * 3000},
    ]  # fmt: skip
    for wrong in refused:
        assert server.post("/v1/embeddings", wrong).status_code == 400, wrong
    server.check_health()


def test_tokens_and_templates(server: Running) -> None:
    text = "Hello <|im_end|> 中"
    reply = server.post("/tokenize", {"content": text}).json()
    assert reply["tokens"] == server.model.tokenize(text)
    assert reply["count"] == len(reply["tokens"])
    assert server.post("/tokenize", {"prompt": text}).json() == reply
    as_text = server.post("/tokenize", {"content": text, "parse_special": False}).json()
    assert as_text["count"] > reply["count"]
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == reply["tokens"]
    several: list[list[int]] = [reply["tokens"], as_text["tokens"], []]
    for tokens in several:
        back = server.post("/detokenize", {"tokens": tokens}).json()
        assert back["content"] == back["prompt"] == (text if tokens else "")
    assert server.post("/detokenize", {"tokens": [400]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/tokenize", {"content": "a", "prompt": "a"}).status_code == 400
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    prompt = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert prompt == server.model.render(messages)
    rendered = server.post(
        "/apply-template", {"messages": messages, "add_generation_prompt": False}
    )
    assert prompt.startswith(rendered.json()["prompt"])
    assert len(prompt) > len(rendered.json()["prompt"])


def test_what_the_server_says_of_itself(server: Running) -> None:
    assert server.client.get("/ready").json() == {"status": "ready"}
    (card,) = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", server.model.context_size)
    properties = server.client.get("/props").json()
    assert properties["n_ctx"] == server.model.context_size
    assert properties["thinking"] == {"values": [True, False], "default": True}
    assert "/" not in properties["system_fingerprint"]
    page = server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "<script" not in page.text


def test_progress_and_pings(server: Running) -> None:
    prompt = [5 + i % 300 for i in range(900)]
    body = {"prompt": prompt, "max_tokens": 2, "return_progress": True, "return_tokens": True}
    chunks = streamed(server, "/v1/completions", body)
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert progress[-1]["processed"] == progress[-1]["total"] == 900
    assert len(progress) > 2
    assert chunks[-1]["choices"][0]["tokens"]


def test_an_error_on_the_way(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """STR-04, NUM-05: the client is told in the stream, and its neighbours are not concerned."""
    runner = server.model.loaded.engine.runner
    calls = 0

    def broken(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise NonFiniteError("non-finite logits at position 9")

    with slowed(server.model, 0):
        slow = server.model.loaded.engine.runner
        step = slow.step

        def failing(*arguments: Any) -> None:
            broken()
            step(*arguments)

        monkeypatch.setattr(slow, "step", failing)
        chunks = streamed(server, CHAT, LONG)
        calls = 5
        whole = server.post(CHAT, LONG)
    assert server.model.loaded.engine.runner is runner
    assert chunks[-1]["error"]["code"] == "non_finite_logits"
    assert chunks[-1]["error"]["request_id"]
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "non_finite_logits"
    server.check_health()


def test_minus_infinity_is_a_number(server: Running) -> None:  # STR-05
    from smolrun.server import replies

    assert replies.logprob(-math.inf) == -9999.0
    assert replies.logprob(-1e6) == -9999.0
    with pytest.raises(ValueError, match="JSON compliant"):
        replies.dumped({"x": math.nan})


def test_a_message_that_has_begun_goes_on(server: Running) -> None:
    messages = [*GREEDY["messages"], {"role": "assistant", "content": "Because"}]
    body = {**GREEDY, "messages": messages, "continue_final_message": True}
    choice = server.post(CHAT, {**body, "add_generation_prompt": False}).json()["choices"][0]
    prompt = server.post("/apply-template", {"messages": messages, "continue_final_message": True})
    text = prompt.json()["prompt"]
    assert text.endswith("Because")
    ids = server.model.tokenizer.encode(text, add_bos=False)
    expected = server.model.generate(ids, max_tokens=GREEDY["max_tokens"], temperature=0)
    assert choice["message"]["content"] == expected.text


def test_timings_of_every_piece(server: Running) -> None:
    for path, body in (
        (CHAT, GREEDY),
        ("/v1/completions", {"prompt": "The sky", **plain(6), "logprobs": 1}),
    ):
        chunks = streamed(server, path, {**body, "timings_per_token": True})
        timed = [chunk["timings"] for chunk in chunks if "timings" in chunk]
        assert len(timed) >= len(chunks) - 1, "all but the role"
        counts = [one["predicted_n"] for one in timed]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert set(timed[0]) == set(timed[-1])
        assert all(one["prompt_ms"] > 0 for one in timed)
        assert len([c for c in streamed(server, path, body) if "timings" in c]) == 1


def test_reasoning_is_left_in_the_content(server: Running) -> None:
    """`reasoning_format: none` gives the text as it was written, tags and all."""
    opened = server.model.tokenizer.id_of("<think>")
    body = {
        **GREEDY, "max_tokens": 40, "ignore_eos": True, "thinking_budget": 8, "seed": 1,
        "logit_bias": {str(opened): 100},
    }  # fmt: skip
    split = server.post(CHAT, body).json()
    message = split["choices"][0]["message"]
    assert message["reasoning_content"]
    raw = server.post(CHAT, {**body, "reasoning_format": "none"}).json()
    whole = raw["choices"][0]["message"]
    assert "reasoning_content" not in whole
    assert whole["content"].startswith("<think>")
    assert whole["content"].endswith(message["content"])
    for part in (message["reasoning_content"], "</think>"):
        assert part in whole["content"]
    assert raw["usage"] | {"prompt_tokens_details": None} == split["usage"] | {
        "prompt_tokens_details": None
    }
    assert raw["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = streamed(server, CHAT, {**body, "reasoning_format": "none"})
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"]
    assert not any("reasoning_content" in delta for delta in deltas)
