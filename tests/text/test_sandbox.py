"""Hostile chat templates: nothing leaks, nothing runs away, and load says so."""

from __future__ import annotations

import datetime
import locale
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError

from smolrun.errors import TemplateError
from smolrun.text import probe, sandbox
from smolrun.text.chat import ChatTemplate
from smolrun.text.sandbox import LimitError, environment, strftime
from tests.waiting import SECONDS, joined, started

from .support import byte_tokenizer

SIZE = 70_000


def render(source: str, **variables: object) -> str:
    template, _ = environment().prepare(source)
    return environment().run(template, {"messages": [], **variables}, SIZE)


REACHES = [
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{{ range.__class__ }}",
    "{{ dict.mro() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__.__mro__}'.format(x=1) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ 'a'.encode() }}",
    "{{ (1).to_bytes(1, 'big') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.func.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ {'a': 1}.update({'b': 2}) }}",
]
LOOPS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(100001) %}{% endfor %}",
    "{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% macro m(n) %}{% call m(n) %}{{ n }}{% endcall %}{{ caller() }}{% endmacro %}{{ m(1) }}",
    "{% for i in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | map('string') | join %}{% endfor %}",
    "{% for i in range(99999) if range(99999) | sum %}{% endfor %}",
]
GROWTH = [
    "{{ 'a' * 2000000000 }}",
    "{{ 2000000000 * 'a' }}",
    "{{ [1] * 2000000000 }}",
    "{{ (1, 2) * 2000000000 }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a'.center(2000000000) }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ 'a'.rjust(2000000000) }}",
    "{{ 'a'.zfill(2000000000) }}",
    "{{ 'a\ta'.expandtabs(2000000000) }}",
    "{{ 'a\ta'.expandtabs(tabsize=2000000000) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '%*d' % (2000000000, 1) }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ '{:2000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 2000000000) }}",
    "{{ ('{0}' * 20000).format('a' * 60000) }}",
    "{{ ('%(x)s' * 10000) % {'x': 'a' * 60000} }}",
    "{{ ('a' * 60000).replace('a', 'b' * 60000) }}",
    "{{ ('a' * 60000) | replace('a', 'b' * 60000) }}",
    "{{ ('a' * 60000).replace('', 'b' * 60000) }}",
    "{{ ('b' * 60000).join(('a' * 60000) | list) }}",
    "{{ ('a' * 60000) | list | join('b' * 60000) }}",
    "{{ ('a\n' * 30000) | indent(60000) }}",
    "{{ 'a\na' | indent(2000000000) }}",
    "{{ [1] | batch(2000000000, 0) | list }}",
    "{{ [[1]] | tojson(indent=2000000000) }}",
    "{{ (range(60000) | list) | tojson(indent=16) }}",
    "{{ 1.5 | round(2000000000, 'ceil') }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% endfor %}",
    "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(s='a') %}"
    "{% for i in range(99) %}{% set ns.s = d(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}"
    "{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}"
    "{% endfor %}{{ ns.s | tojson }}",
    "{{ range(99999) | map('string') | map('replace', '1', 'a' * 60000) | list | length }}",
    "{{ range(99999) | map('attr', 'x') | map('default', 'a' * 60000) | list | string }}",
    "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "{% set s %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "{{ strftime_now('%2000000000d') }}",
    "{{ strftime_now('%A' * 1000) }}",
    "x" * 300_000,
]
BROKEN = [
    "{% if %}",
    "{{ ",
    "{% unknown %}",
    "{{ 1 | unknown }}",
    "{% for i in range(2) %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ " + "[" * 90 + "]" * 90 + "." + "x." * 2000 + "y }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{{ 1 / 0 }}",
    "{{ missing.field }}",
    "{{ lipsum(100000) }}",
]


@pytest.mark.parametrize("source", REACHES)
def test_nothing_of_python_can_be_reached(source: str) -> None:
    try:
        text = render(source)
    except SecurityError:
        return
    # What has no such attribute for the sandbox renders as nothing.
    assert text == ""


@pytest.mark.parametrize("source", LOOPS)
def test_loops_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises((LimitError, RecursionError, OverflowError)):
        render(source)


@pytest.mark.parametrize("source", GROWTH, ids=lambda source: source[:60])
def test_values_do_not_grow_without_bound(source: str) -> None:
    with pytest.raises(SecurityError):
        render(source)


@pytest.mark.parametrize("source", REACHES[:3] + LOOPS[:4] + GROWTH[:6] + BROKEN)
def test_such_a_template_is_refused_at_load(source: str) -> None:
    with pytest.raises(TemplateError, match=r"^model\.gguf: the chat template"):
        ChatTemplate(source, byte_tokenizer(), "model.gguf")


def test_a_template_that_turns_later_is_stopped_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)
    source = "{% if messages | length > 20 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    source += "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    found = ChatTemplate(source, byte_tokenizer(), "model.gguf")
    message = {"role": "user", "content": "a"}
    assert found.render([message]) == "a"
    with pytest.raises(TemplateError, match=r"model\.gguf.*was stopped.*steps"):
        found.render([message] * 21)
    assert found.render([message]) == "a"
    recursive = "{% macro m() %}{{ m() }}{% endmacro %}{{ messages[0].content }}"
    recursive += "{% if messages | length > 20 %}{{ m() }}{% endif %}"
    found = ChatTemplate(recursive, byte_tokenizer(), "model.gguf")
    with pytest.raises(TemplateError, match="does not end"):
        found.render([message] * 21)


def test_output_may_grow_with_the_input() -> None:
    found = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        byte_tokenizer(),
        "test",
    )
    text = "word " * 200_000
    assert found.render([{"role": "user", "content": text}]) == text * 2


def test_many_messages_are_within_the_limits() -> None:
    found = ChatTemplate(
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content + '\n' }}{% endfor %}",
        byte_tokenizer(),
        "test",
    )
    messages = [{"role": "user", "content": f"{i}"} for i in range(20_000)]
    assert found.render(messages).count("\n") == 20_000


def test_what_the_sandbox_counts_renders_as_before() -> None:
    source = (
        "{% for a in range(3) %}{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}"
        "{{ loop.revindex }}{% if not loop.first %}{{ loop.previtem }}{% endif %} {% endfor %}"
        "{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k ~ v }}{% endfor %}"
        "{% for a in missing %}x{% else %}none{% endfor %}"
        "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}"
        "{% for a in [1, 2, 3] %}{% break %}{% endfor %}"
        "{{ [1, 2, 3][::-1] }}{{ (1, 'a') }}{{ {'a': [1]} }}"
        "{{ 'a' ~ none ~ 1 }}{{ '%s-%d' % ('a', 2) }}{{ '{}{x}'.format(1, x=2) }}{{ 2 ** 3 }}"
        "{{ ['a', 'b'] | join(', ') }}{{ [{'n': 1}, {'n': 2}] | map(attribute='n') | join }}"
        "{{ 'a\nb' | indent(2) }}{{ 'ab' | center(4) }}|{{ [1, 2, 3] | batch(2) | list }}"
        "{{ [1, 2] | sum }}{{ 1.25 | round(1) }}{{ 'aa' | replace('a', 'b', 1) }}"
        "{% filter upper %}x{{ 'y' }}{% endfilter %}{% set s %}z{% endset %}{{ s }}"
        "{% generation %}g{% endgeneration %}"
    )
    assert render(source) == (
        "1/33 2/320 3/3!11 "
        "x1y2none13[3, 2, 1](1, 'a'){'a': [1]}aNone1a-2128a, b12a\n  b ab |[[1, 2], [3]]"
        "31.2baXYzg"
    )


def test_json_is_written_as_transformers_writes_it() -> None:
    value = {"b": "<é>&'\"", "a": [1, None, True, 1.5]}
    assert render("{{ v | tojson }}", v=value) == ('{"b": "<é>&\'\\"", "a": [1, null, true, 1.5]}')
    assert render("{{ v | tojson(sort_keys=true, indent=2, ensure_ascii=true) }}", v=value) == (
        '{\n  "a": [\n    1,\n    null,\n    true,\n    1.5\n  ],\n  "b": "<\\u00e9>&\'\\""\n}'
    )
    assert render("{{ v | tojson(separators=(',', ':')) }}", v={"a": 1}) == '{"a":1}'


def test_dates_are_english_whatever_the_locale() -> None:
    moment = datetime.datetime(2025, 3, 5, 14, 7)
    assert strftime(moment, "%d %B %Y, %A %b %a %H:%M %% %-d") == (
        "05 March 2025, Wednesday Mar Wed 14:07 % 5"
    )
    before = locale.setlocale(locale.LC_TIME)
    try:
        locale.setlocale(locale.LC_TIME, "de_DE.UTF-8")
    except locale.Error:
        return
    try:
        assert strftime(moment, "%B") == "March"
    finally:
        locale.setlocale(locale.LC_TIME, before)


def test_threads_have_budgets_of_their_own() -> None:
    template, _ = environment().prepare("{% for i in range(n) %}x{% endfor %}")
    results: dict[int, object] = {}

    def work(place: int) -> None:
        size = 70_000 if place % 2 else 10
        try:
            results[place] = len(environment().run(template, {"n": 30_000}, size))
        except LimitError as error:
            results[place] = type(error)

    joined([started(work, place) for place in range(6)])
    assert results == {place: 30_000 if place % 2 else LimitError for place in range(6)}


def test_the_trial_ends_what_the_sandbox_overlooks(monkeypatch: pytest.MonkeyPatch) -> None:
    for body, status in (
        ("while True: pass", "ended with exit status -"),
        ("x = bytearray(1 << 34)", "MemoryError"),
    ):
        command = (
            "import json, sys; given = json.load(sys.stdin); sys.path[:] = given['path']; "
            "from smolrun.text.probe import _limit_this_process; _limit_this_process()\n" + body
        )
        monkeypatch.setattr(probe, "_COMMAND", command)
        with pytest.raises(TemplateError, match=status):
            probe.probe("{{ 1 }}", {}, "model.gguf")


def test_the_trial_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "made"
    source = f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    with pytest.raises(TemplateError):
        ChatTemplate(source, byte_tokenizer(), "model.gguf")
    assert os.listdir(tmp_path) == []


def test_the_trial_starts_light() -> None:
    path = [str(Path(probe.__file__).parents[2]), *sys.path]
    script = (
        f"import sys; sys.path[:] = {path!r}; import smolrun.text.probe, smolrun.text.sandbox; "
        "print(sorted({'numpy', 'tokenizers', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert done.stdout.strip() == "[]"
