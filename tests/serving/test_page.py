"""The page to chat with, in a real browser: ``make browser-test``."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import browser
import pytest
from served_model import KEYS, batch, until

from ciphertune.serving.server import Server

pytestmark = [
    pytest.mark.skipif(browser.installed() is None, reason=f"no browser is installed ({', '.join(browser.NAMES)})"),
    pytest.mark.skipif("CIPHERTUNE_BROWSER" not in os.environ, reason="in a browser with 'make browser-test' alone"),
]


@pytest.fixture
def page() -> Iterator[browser.Browser]:
    found = browser.Browser(browser.installed() or "")
    yield found
    found.close()


def shown(page: browser.Browser) -> list[list[str]]:
    """Kind and text of each message."""
    script = "[...document.querySelectorAll('.message')].map(m => [m.className.split(' ')[1], m.textContent])"
    found: list[list[str]] = page.run(script)
    return found


def answered(page: browser.Browser) -> None:
    page.until("document.querySelector('#stop').hidden && document.querySelectorAll('.counts, .error').length > 0")


def test_a_conversation(page: browser.Browser, serve: Callable[..., Server], script: Callable[[str], None]) -> None:
    script("<b>two</b> & 'three'")
    server = serve()
    page.open(server.address)
    page.until("document.querySelector('#model').textContent === 'tiny'")
    page.write("What is one and one?\n")
    answered(page)
    assert shown(page)[:2] == [["user", "What is one and one?"], ["assistant", "<b>two</b> & 'three'"]]
    assert page.run("document.querySelectorAll('#messages b').length") == 0, "text is text"
    prompts: list[Any] = []
    take = server._engine._waiting.add
    server._engine._waiting.add = lambda answers: (prompts.append(answers[0].prompt), take(answers))  # type: ignore
    page.write("And?\n")
    page.until("document.querySelectorAll('.counts').length === 2")
    asked = "".join(chr(token + 32) for token in prompts[0] if token < 95)
    assert asked.startswith("<user>What is one and one?"), "the whole conversation is sent"
    assert "<b>two</b>" in asked
    page.click("#new")
    assert shown(page) == []
    assert page.problems == []
    assert {url.split("/")[2] for url in page.requested.values()} == {server.address.split("/")[2]}


def test_stop_ends_an_answer(page: browser.Browser, serve: Callable[..., Server]) -> None:
    server = serve(max_new_tokens=200)
    page.open(server.address)
    page.write("Hello\n")
    page.until("document.querySelector('.assistant')?.textContent.length > 0")
    (answer,) = batch(server)
    page.click("#stop")
    until(lambda: not batch(server))
    assert answer.computed < 200
    page.until("!document.querySelector('#send').hidden")
    assert page.problems == []


def test_a_key_is_asked_for(page: browser.Browser, serve: Callable[..., Server], script: Callable[[str], None]) -> None:
    script("yes")
    page.open(serve(api_keys=KEYS).address)
    page.until("!document.querySelector('#key').hidden")
    page.run("document.querySelector('#key').focus()")
    page.write(KEYS[1])
    page.run("document.querySelector('#prompt').focus()")
    page.write("Hello\n")
    page.until("document.querySelectorAll('.counts').length === 1")
    assert ["assistant", "yes"] in shown(page)


def test_an_error_is_shown_and_the_question_kept(page: browser.Browser, serve: Callable[..., Server]) -> None:
    page.open(serve().address)
    page.until("document.querySelector('#model').textContent === 'tiny'")
    page.write("x" * 300 + "\n")
    answered(page)
    assert [kind for kind, _ in shown(page)] == ["error"]
    assert "256 positions" in shown(page)[0][1]
    assert page.run("document.querySelector('#prompt').value.length") == 300


def test_foreign_content_is_refused(page: browser.Browser, serve: Callable[..., Server]) -> None:
    page.open(serve().address)
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\">')")
    page.run(
        "{ const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s) }"
    )
    assert page.run("window.ran === undefined")
    assert page.run("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    assert not [url for url in page.requested.values() if "example.org" in url]
    assert "https://example.org/x.png" in page.blocked
