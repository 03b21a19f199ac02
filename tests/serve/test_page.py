"""The page in a real browser: from the slider to a model that answers as `lop prune`'s does."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lop
from lop.cli import main
from tests.serve.conftest import Service, Start

playwright = pytest.importorskip("playwright.sync_api")
_BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Where to write the pictures of docs/, if they are wanted.
_PICTURES = os.environ.get("LOP_PICTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        try:
            # Without a sandbox of its own: as root, as in most containers, Chromium would not start.
            started = driver.chromium.launch(executable_path=_BROWSER, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error:
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        yield started
        started.close()


@pytest.fixture
def page(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    context = browser.new_context(viewport={"width": 1100, "height": 1000}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    yield opened
    assert wrong == []
    context.close()


def settle(page: "playwright.Page") -> None:
    """Waits until what the slider asks for is what is shown."""
    page.wait_for_selector("#ask[aria-busy=false]")


def picture(page: "playwright.Page", name: str) -> None:
    if _PICTURES:
        page.screenshot(path=Path(_PICTURES) / name, full_page=True)


def test_from_the_slider_to_the_same_logits_as_lop_prune(
    page: "playwright.Page", service: Service, tmp_path: Path
) -> None:
    page.goto(service.url)
    settle(page)
    before = page.text_content("#bytes")
    page.fill("#slider", "500")
    settle(page)
    assert page.text_content("#bytes") != before
    ratio = float(page.text_content("#ratio").rstrip("%")) / 100
    widths = [int(text) for text in page.locator("#rows td:nth-child(2)").all_text_contents()]
    asked = {"model": "tiny", "target": {"ratio": float(page.input_value("#slider")) / 1000}}
    largest = service.ask("GET", "/v1/models").json["models"][0]["targets"]["ratio"]["largest"]
    asked["target"]["ratio"] = round(0.5 * largest, 4)
    expected = service.ask("POST", "/v1/allocations", asked).json
    assert widths == expected["widths"]
    assert ratio == pytest.approx(expected["ratio"], abs=6e-4)
    assert page.locator("#chart .kept").count() == len(widths)
    assert "%" in page.text_content("#accuracy")
    page.select_option("#recovery", "none")
    settle(page)
    assert "without recovery" in page.text_content("#source")
    page.click("#make-button")
    page.wait_for_selector("#done:not([hidden])")
    picture(page, "page.png")
    folder = tmp_path / "downloaded"
    for link in page.locator("#files a").all():
        with page.expect_download() as download:
            link.click()
        download.value.save_as(folder / download.value.suggested_filename)
    target = str(asked["target"]["ratio"])
    assert main(["prune", "--target", target, "--recovery", "none", "--out", str(tmp_path / "pruned")]) == 0
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        ours, theirs = (lop.load(path)(input_ids=tokens).logits for path in (folder, tmp_path / "pruned"))
    assert torch.equal(ours, theirs)
    # The three lines do what they say.
    namespace: dict[str, object] = {}
    exec(page.text_content("#snippet").replace('out="', f'out="{tmp_path}/'), namespace)
    with torch.inference_mode():
        assert torch.equal(namespace["model"](input_ids=tokens).logits, theirs)  # type: ignore[operator]


def test_a_card_is_named_and_the_curve_shows_what_it_gets(page: "playwright.Page", service: Service) -> None:
    page.goto(service.url)
    settle(page)
    # The dense model, every measured size, and the one asked for.
    assert page.locator("#curve circle.dense").count() == 1
    assert page.locator("#curve circle.measured").count() >= 2
    assert page.locator("#curve circle.chosen").count() == 1
    assert "Dense" in page.text_content("#curve-text")
    page.locator("input[value=memory]").focus()
    page.keyboard.press("Space")
    settle(page)
    assert page.is_hidden("#slider")
    page.fill("#context", "500")
    page.locator("[data-gib='8']").focus()
    page.keyboard.press("Enter")
    settle(page)
    assert page.input_value("#memory") == "8"
    assert page.text_content("#ratio") == "0.0%"  # More than `tiny` can fill.
    page.fill("#memory", "0.005")
    settle(page)
    # What the page says is what the service answers.
    asked = {"memory": round(0.005 * 2**30), "context": 500, "images": 4, "batch": 1}
    expected = service.ask("POST", "/v1/allocations", {"model": "tiny", "target": asked}).json
    assert 0 < expected["ratio"] < 1
    assert page.text_content("#ratio") == f"{100 * expected['ratio']:.1f}%"
    assert page.text_content("#taken") == f"{expected['memory'] / 1e6:.3f} MB"
    picture(page, "page-card.png")
    page.fill("#memory", "0.001")
    page.wait_for_selector("#problem:not([hidden])")
    assert "at least" in page.text_content("#problem")


def test_fewer_bits_make_other_sizes(page: "playwright.Page", service: Service) -> None:
    page.goto(service.url)
    settle(page)
    assert page.locator("#bits option").all_text_contents() == ["16", "8", "4"]
    page.locator("input[value=bytes]").check()
    page.fill("#slider", "1000")
    settle(page)
    least = page.text_content("#bytes")
    page.select_option("#bits", "8")
    settle(page)
    (offered,) = service.ask("GET", "/v1/models").json["models"]
    ranges = {each["bits"]: each["bytes"] for each in offered["quantised"]}
    assert page.text_content("#bytes") == f"{ranges[8]['least'] / 1e6:.3f} MB" != least
    assert "not measured" in page.text_content("#accuracy")
    page.click("#make-button")
    page.wait_for_selector("#done:not([hidden])")
    assert "bits=8" in page.text_content("#snippet")


def test_the_keyboard_is_enough(page: "playwright.Page", start: Start) -> None:
    service = start()
    page.goto(service.url)
    settle(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#slider").focus()
    shown = page.text_content("#asked")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    settle(page)
    assert page.text_content("#asked") != shown
    page.locator("input[value=parameters]").focus()
    page.keyboard.press("Space")
    settle(page)
    assert "M" in page.text_content("#asked")
    # Tab alone leads from the slider to the button, and each stop is visible.
    page.select_option("#recovery", "none")
    page.locator("#slider").focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "make-button":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#job[data-state=complete]")
    page.locator("#cancel").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#job", state="hidden")
    assert service.store.all() == []
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button, progress')].filter("
        "e => !e.labels?.length && !e.textContent && !e.ariaLabel).map(e => e.id)"
    )
    assert unnamed == []


def test_a_phone_in_the_dark(browser: "playwright.Browser", service: Service) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", is_mobile=True)
    page = context.new_page()
    page.goto(service.url)
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background, text = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert sum(_channels(background)) < 150 < 600 < sum(_channels(text))
    picture(page, "page-phone.png")
    context.close()


def test_a_key_is_asked_for_and_used(page: "playwright.Page", start: Start) -> None:
    service = start(keys=["k" * 16])
    page.goto(service.url)
    page.wait_for_selector("#problem:not([hidden])")
    page.fill("#key", "k" * 16)
    page.keyboard.press("Enter")
    settle(page)
    page.select_option("#recovery", "none")
    page.click("#make-button")
    page.wait_for_selector("#done:not([hidden])")
    with page.expect_download() as download:
        page.locator("#files a").first.click()
    assert Path(download.value.path()).stat().st_size > 0


def test_what_is_wrong_is_said(page: "playwright.Page", start: Start) -> None:
    service = start(workers=0, queue=1)
    page.goto(service.url)
    settle(page)
    service.make({"ratio": 0.5})
    page.click("#make-button")
    page.wait_for_selector("#problem:not([hidden])")
    assert "waiting" in page.text_content("#problem")


def _channels(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
