"""The page in a browser without a window: a question in Chinese, its answer, its colours."""

import shutil
import subprocess
import time

import pytest
import torch

from nanomed.model.decoder import Aquila, init_weights
from nanomed.tools import serve_jobs
from nanomed.tools.chat import SAFETY
from tests.tools.serving import serving

pytestmark = pytest.mark.slow
ANSWER = "普通感冒常表现为<b>鼻塞</b>、流涕😀。"


@pytest.fixture(scope="module")
def page():
    """Chromium, playwright's own or this machine's."""
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with browsers.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except browsers.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield browser.new_page(viewport={"width": 900, "height": 800})
        browser.close()


@pytest.fixture
def url(encoder, small, monkeypatch, page):
    """A model whose tokens are scripted, with probability 0.9 or 0.1 turn by turn, and slow."""
    with torch.device("meta"):
        model = Aquila(small)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    ids = encoder.tokenizer.encode(ANSWER)

    def scripted(model, prompts, stop, sampling, first=0):
        for k, token in enumerate([*ids, encoder.turn_end][: sampling.max_new]):
            logits = torch.full((encoder.tokenizer.vocab_size,), -20.0)
            logits[token], logits[(token + 1) % 900] = (0.9, 0.1) if k % 2 else (0.1, 0.9)
            time.sleep(0.02)
            yield 0, token, logits.clamp(min=1e-9).log()

    monkeypatch.setattr(serve_jobs, "stream", scripted)
    with serving(model, encoder) as (url, server):
        server.asked = []
        ask = server.worker.ask
        server.worker.ask = lambda job: (server.asked.append(job), ask(job))
        yield url, server


def text_of(page, kind: str) -> list[str]:
    return page.locator(f".turn.{kind}").all_inner_texts()


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:not([disabled])")


def test_a_conversation(page, url):
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda asked: errors.append(asked.url))
    page.goto(url[0])
    assert page.inner_text("#safety") == SAFETY and page.title() == "the-model"
    say(page, "感冒有什么症状？")
    assert text_of(page, "user") == ["感冒有什么症状？"] and text_of(page, "assistant") == [ANSWER]
    assert page.locator(".assistant b").count() == 0  # what a model writes is text
    assert page.locator(".token").count() == 0
    say(page, "还有呢？")
    decode = url[1].worker.encoder.tokenizer.decode
    prompt = decode(url[1].asked[-1].prompt)
    assert prompt.index("感冒有什么症状") < prompt.index(ANSWER) < prompt.index("还有呢")
    page.click("#clear")
    assert text_of(page, "assistant") == []
    assert set(errors) == {f"{url[0]}/", f"{url[0]}/v1/chat/completions"}  # what it asked for


def test_tokens_are_coloured_by_their_probability(page, url):
    page.goto(url[0])
    page.check("#colour")
    say(page, "感冒有什么症状？")
    tokens = page.locator(".token")
    assert text_of(page, "assistant") == [ANSWER]
    shown = [token.get_attribute("title").split("\n")[0] for token in tokens.all()]
    assert {"90.0%", "10.0%"} <= set(shown)
    drawn = tokens.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    colours = dict(zip(shown, drawn, strict=True))
    red, green = (list(map(int, colours[t][4:-1].split(","))) for t in ("10.0%", "90.0%"))
    assert red[0] > red[1] and green[1] > green[0]
    assert len(tokens.first.get_attribute("title").split("\n")) == 4  # and three alternatives


def test_an_answer_is_stopped_cut_off_or_refused(page, url):
    page.goto(url[0])
    page.fill("#most", "2")
    say(page, "感冒？")
    assert text_of(page, "assistant")[0].endswith(" […]")
    page.fill("#most", "0")
    say(page, "感冒？")
    assert "max_new is 0" in text_of(page, "error")[0] and len(text_of(page, "user")) == 2
    page.fill("#most", "512")
    page.fill("#text", "感冒？")
    page.press("#text", "Enter")
    page.wait_for_selector(".assistant:last-child span")
    page.click("#stop")
    page.wait_for_selector("#send:not([disabled])")
    last = text_of(page, "assistant")[-1]
    assert ANSWER.startswith(last) and last != ANSWER


def test_chinese_shows(page, url):
    """Two characters that no font has are the same empty box."""
    fonts = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True).stdout
    if not fonts:
        pytest.skip("this machine has no Chinese font (apt-get install fonts-noto-cjk)")
    page.goto(url[0])
    pictures = []
    for character in "医药":
        page.click("#clear")
        page.evaluate("c => turn('user').textContent = c", character)
        pictures.append(page.locator(".turn.user").screenshot())
    assert pictures[0] != pictures[1]


def test_two_boxes_would_be_the_same(page, url):
    """The test above can fail: of characters that no font has."""
    page.goto(url[0])
    pictures = []
    for character in "\ue123\ue124":
        page.click("#clear")
        page.evaluate("c => turn('user').textContent = c", character)
        pictures.append(page.locator(".turn.user").screenshot())
    assert pictures[0] == pictures[1]
