"""The rating page in a real browser: what is clicked is on disk, what models wrote is text, and nothing leaves the machine."""

import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.running import ROOT, read_rows, run, write_rows

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LACKING = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
LACKING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not path]
if LACKING:
    pytest.skip(f"not installed: {', '.join(LACKING)}", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SHEETS, PAGE, REPORT = (ROOT / f"eval/preference/{name}.py" for name in ("sheets", "page", "report"))
ATTACK = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><b>bold</b> **stars**"


def serve(folder: str, argv: list[str]) -> None:
    """`python page.py *argv` in `folder`; addresses.txt gets every address that the server listens on or looks for."""
    os.chdir(folder)
    log = os.open("page.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    addresses = os.open("addresses.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event, args):
        if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
            address = args[1] if event in ("socket.connect", "socket.bind") else args
            os.write(addresses, f"{event} {address[0] if isinstance(address, tuple) else address}\n".encode())

    sys.addaudithook(watch)
    sys.argv = ["page.py", *argv]
    runpy.run_path(str(PAGE), run_name="__main__")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """`page()` starts the server for alice on four items, and returns its address; it ends with the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("secret_one", "secret_two"):
        texts = [ATTACK + name[-3:], f"first {name[-3:]}", f"second\n{name[-3:]}", f"third {name[-3:]}"]
        write_rows(f"{name}.jsonl", [{"prompt": f"<i>Question</i> {i}?", "answer": t} for i, t in enumerate(texts)])
    command = ["--runs", "secret_one.jsonl", "secret_two.jsonl", "--raters", "alice", "--output", "out"]
    assert run(*command, script=SHEETS).code == 0
    started = []

    def start():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = ["--sheets", "out", "--rater", "alice", "--port", str(port)]
        # forked from the server that has the slow imports done
        started.append(multiprocessing.get_context("forkserver").Process(target=serve, args=(os.getcwd(), argv)))
        started[-1].start()
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].is_alive(), Path("page.log").read_text()
                time.sleep(0.2)
        raise TimeoutError(Path("page.log").read_text())

    def crash():
        started[-1].kill()
        started[-1].join()

    start.crash = crash
    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
    flags += f"disable-component-update window-size=1300,1000 user-data-dir={tmp_path}/browser"
    for flag in [*flags.split(), "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def text(browser, name):
    return browser.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input").get_attribute("value")


def wait(browser, said):
    """Until the page says so at its top."""

    def says(browser):
        return browser.find_elements(By.ID, "progress") and said in text(browser, "progress")

    WebDriverWait(browser, 30).until(says, f"no {said!r}")


def rate(browser, name, rating):
    browser.find_element(By.CSS_SELECTOR, f'#{name} [data-testid="{rating}-radio-label"]').click()


def rating(browser, name):
    chosen = browser.find_elements(By.CSS_SELECTOR, f"#{name} input:checked")
    return int(chosen[0].get_attribute("value")) if chosen else None


def click(browser, name):
    browser.find_element(By.ID, name).click()


def votes():
    return read_rows("out/votes-alice.jsonl") if Path("out/votes-alice.jsonl").exists() else []


def test_a_rater_votes_reloads_goes_on_and_changes_a_vote(page, browser):
    address = page()
    items = read_rows("out/sheet-alice.jsonl")
    browser.get(address)
    wait(browser, "Item 1 of 4 · 0 rated")
    sources = [browser.page_source]
    assert [text(browser, name) for name in ("prompt", "left", "right")] == list(items[0].values())[1:]
    for name, value in (("left_helpful", 4), ("right_honest", 1)):
        rate(browser, name, value)
    browser.find_element(By.CSS_SELECTOR, "#comment textarea, #comment input").send_keys("clear")
    click(browser, "left")  # the answer is no button
    click(browser, "vote_left")
    wait(browser, "Item 2 of 4 · 1 rated")
    first = {"item": 1, "vote": "left", "left_helpful": 4, "right_honest": 1, "comment": "clear"}
    assert [kept(vote) for vote in votes()] == [first]  # on disk before the next item is shown
    assert rating(browser, "left_helpful") is None and text(browser, "comment") == ""
    click(browser, "vote_tie")
    wait(browser, "Item 3 of 4 · 2 rated")
    page.crash()
    address = page()
    browser.get(address)
    wait(browser, "Item 3 of 4 · 2 rated")
    click(browser, "vote_bad")
    wait(browser, "Item 4 of 4 · 3 rated")
    browser.refresh()
    wait(browser, "Item 4 of 4 · 3 rated")
    for number in (3, 2, 1):
        click(browser, "back")
        wait(browser, f"Item {number} of 4 · 3 rated")
    wait(browser, "your vote: Left is better")
    shown = (rating(browser, "left_helpful"), rating(browser, "right_honest"), rating(browser, "left_honest"))
    assert shown == (4, 1, None) and text(browser, "comment") == "clear"
    rate(browser, "right_honest", 5)
    click(browser, "vote_right")
    wait(browser, "Item 4 of 4 · 3 rated")
    sources.append(browser.page_source)
    click(browser, "vote_right")
    wait(browser, "All are rated")
    assert [kept(vote) for vote in votes()] == [
        first, {"item": 2, "vote": "tie"}, {"item": 3, "vote": "bad"},
        first | {"vote": "right", "right_honest": 5}, {"item": 4, "vote": "right"},
    ]  # fmt: skip
    with urllib.request.urlopen(address) as page_source:
        sources.append(page_source.read().decode())
    assert not any("secret_" in source for source in sources)
    done = run("--sheets", "out", script=REPORT)
    assert done.code == 0 and "alice: 4 of 4 items" in done.out, done.err


def kept(vote: dict) -> dict:
    """A vote without its time and what was left open."""
    assert vote["time"].endswith("+00:00")
    return {name: value for name, value in vote.items() if name != "time" and value not in (None, "")}


def test_what_models_wrote_is_text_and_nothing_is_asked_of_another_host(page, browser):
    browser.get(page())
    at = 1 + next(n for n, item in enumerate(read_rows("out/sheet-alice.jsonl")) if "script" in item["left"])
    wait(browser, "Item 1 of 4")
    for number in range(2, at + 1):
        click(browser, "forward")
        wait(browser, f"Item {number} of 4")
    assert {text(browser, "left")[:-3], text(browser, "right")[:-3]} == {ATTACK}
    assert "<i>Question</i>" in text(browser, "prompt")
    time.sleep(0.5)  # what an image does comes later
    assert browser.title == "Which answer is better?"
    assert not browser.find_elements(By.CSS_SELECTOR, "img[src=x], main b, main i, main strong")
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in asked if e["method"] == "Network.requestWillBeSent"]
    urls = [url for url in urls if url.startswith(("http", "ws", "//"))]
    assert len(urls) > 10 and {url.split("/")[2].split(":")[0] for url in urls} == {"127.0.0.1"}
    addresses = set(Path("addresses.txt").read_text().splitlines())
    assert "socket.bind 127.0.0.1" in addresses
    assert {line.split()[1] for line in addresses} <= {"127.0.0.1", "localhost", "None"}, addresses


def test_what_cannot_be_served_is_one_sentence(page):
    for command, said in (
        (["--rater", "bob"], "out/sheet-bob.jsonl does not exist: make it with eval/preference/sheets.py --raters bob"),
        (["--rater", "../bob"], "'../bob' is no rater's name"),
    ):
        done = run("--sheets", "out", *command, script=PAGE)
        assert done.code == 2 and said in done.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--sheets", "out", "--rater", "alice", "--port", taken.getsockname()[1], script=PAGE)
    assert done.code == 2 and "is taken: choose another --port" in done.err
    lines = ["import runpy, sys", "sys.modules['gradio'] = None", f"runpy.run_path({str(PAGE)!r}, run_name='__main__')"]
    Path("without.py").write_text("\n".join(lines))
    done = run("--sheets", "out", "--rater", "alice", script=Path("without.py").absolute())
    assert done.code == 2 and "the page needs gradio: pip install gradio" in done.err
