"""The page of a server in a real browser: writing, stopping, repeating, the keyboard, contrast.

    pip install playwright && apt-get install chromium
    python benchmarks/serving/page.py [--pictures FOLDER]

Starts `neo-jax serve` with the bundled model, prints what it found, and ends with status 1 where
something is not as it must be. The browser needs no network.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from servers import Server, ours

SIZES = {"phone": (390, 844), "desk": (1280, 800)}
PROMPT = "The history of the city begins with"
KEY = "a-key"

# Of every element with a text of its own that shows: the contrast of its text, by WCAG's formula.
CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const isField = each.matches("input:not([type=range], [type=checkbox]), textarea");
    if (!(own || isField) || !each.checkVisibility() || each.matches("script, style")) continue;
    let back = [255, 255, 255];
    for (let up = each; up; up = up.parentElement) {
      const color = parse(getComputedStyle(up).backgroundColor);
      if (color.length === 3 || color[3] === 1) { back = color.slice(0, 3); break; }
    }
    const styles = isField ? [getComputedStyle(each), getComputedStyle(each, "::placeholder")]
      : [getComputedStyle(each)];
    for (const style of styles) {
      const [a, b] = [light(parse(style.color)), light(back)];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const text = each.textContent.slice(0, 20);
      found.push([ratio, `${each.tagName}#${each.id}.${each.className} ${text}`]);
    }
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""

# What can be used, and has no name that a screen reader could say.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, a[href], dialog")]
  .filter((each) => !(each.textContent.trim() && each.tagName !== "TEXTAREA")
    && !each.labels?.length && !each.getAttribute("aria-label")
    && !each.getAttribute("aria-labelledby"))
  .map((each) => each.outerHTML)"""


class Checks:
    """What was found."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, holds: bool, more: object = "") -> None:
        """Prints a line."""
        self.failed += not holds
        print(
            f"{'ok  ' if holds else 'FAIL'} {what}{f': {more}' if more != '' else ''}", flush=True
        )


@contextlib.contextmanager
def opened(browser: Browser, url: str, size: str, check: Checks, **options: str) -> Iterator[Page]:
    """Opens the page, and says what the console did not like."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    until(page, "document.title !== 'neo_jax'")
    page.wait_for_load_state("networkidle")
    yield page
    check(f"no console error ({size}, {options or 'light'})", not errors, errors or "")
    check("no request to elsewhere", all(each.startswith(url) for each in asked))
    context.close()


def new_text(page: Page) -> str:
    return page.locator("#new").text_content() or ""


def until(page: Page, expression: str, seconds: float = 120) -> None:
    """Waits; `wait_for_function` would need a policy that allows eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise TimeoutError(expression)
        time.sleep(0.02)


def finished(page: Page) -> None:
    until(
        page,
        "document.getElementById('stop').disabled && "
        "/token/.test(document.getElementById('status').textContent)",
    )


def writing(page: Page, server: Server, check: Checks) -> None:
    """Text grows, Stop stops, Retry repeats, Another does not, Undo takes back."""
    page.fill("#prompt", PROMPT)
    page.fill("#max_tokens", "400")
    page.click("#write")
    lengths: list[int] = []
    for _ in range(400):
        length = len(new_text(page))
        if length and (not lengths or length > lengths[-1]):
            lengths.append(length)
        if len(lengths) == 5:
            break
        time.sleep(0.01)
    check("text grows while it streams", len(lengths) == 5, lengths)
    check("and a request runs", server.metrics()["num_requests_running"] == 1)
    page.click("#stop")
    finished(page)
    time.sleep(0.3)
    check("Stop leaves no running request", server.metrics()["num_requests_running"] == 0)
    stopped = new_text(page)
    time.sleep(0.3)
    check("nor does text follow", stopped == new_text(page) and len(stopped) > 0)
    page.fill("#max_tokens", "60")
    page.click("#retry")
    finished(page)
    first, seed = new_text(page), page.input_value("#seed")
    page.click("#retry")
    finished(page)
    check("Retry: the same seed gives the same text", new_text(page) == first, f"{first[:50]!r}")
    check("and begins with what was stopped", first.startswith(stopped[:50]) or stopped in first)
    page.click("#another")
    finished(page)
    check("Another: a new seed, another text", new_text(page) != first)
    check("the seed is shown", page.input_value("#seed") != seed)
    last = new_text(page)
    page.click("#write")
    finished(page)
    check("Continue goes on", new_text(page).startswith(last) and len(new_text(page)) > len(last))
    spans = page.locator("#new .t")
    joined = "".join(spans.all_text_contents())
    check("tokens, joined, are the text", joined == new_text(page), spans.count())
    page.click("#undo")
    check("Undo takes back", new_text(page) == last)
    page.locator("#new .t").nth(3).hover()
    rows = page.locator("#tip tr").count()
    check("alternatives on hover", rows >= 5, page.locator("#tip").inner_text().replace("\n", " "))


def chatting(page: Page, check: Checks) -> None:
    """A conversation with Retry."""
    page.click("#tab-chat")
    page.fill("#say", "Tell me about rivers.")
    page.press("#say", "Enter")
    finished(page)
    first = page.locator(".said.assistant div").text_content()
    page.click("#retry")
    finished(page)
    again = page.locator(".said.assistant div").text_content()
    check("chat: Retry gives the same answer", first == again and bool(first), f"{first[:50]!r}")
    check("chat: tokens are shaded", page.locator("#talk .t").count() > 3)


def history(page: Page, url: str, check: Checks) -> None:
    """Kept by the browser, opened again, deleted."""
    page.reload()
    page.wait_for_load_state("networkidle")
    page.click("#open-history")
    lines = page.locator("#history-list li")
    check("history outlives a reload", lines.count() == 2, lines.count())
    page.locator("#history-list li button").nth(2).click()
    check("and is opened again", page.input_value("#prompt") == PROMPT and new_text(page) != "")
    page.click("#open-history")
    page.click("#history-clear")
    check("and deleted", lines.count() == 0)
    page.click("#history-close")


def by_keyboard(page: Page, server: Server, check: Checks) -> None:
    """No mouse: write, read a token's alternatives, change a setting, stop, switch the tab."""

    def to(name: str) -> None:
        for _ in range(60):
            if page.evaluate("document.activeElement.id") == name:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not lead to #{name}")

    to("prompt")
    page.keyboard.type("Once upon a time")
    to("max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type("30")
    to("write")
    page.keyboard.press("Enter")
    finished(page)
    check("keyboard: writes", new_text(page) != "")
    focus = page.evaluate("document.activeElement.id")
    check("keyboard: the focus stays among the buttons", focus in ("write", "stop"), focus)
    to("new")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    check("keyboard: alternatives on focus", page.locator("#tip tr").count() >= 5)
    to("max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type("400")
    page.keyboard.press("Control+Enter")
    until(page, "!document.getElementById('stop').disabled")
    until(page, "document.querySelectorAll('#new .t').length > 35")
    page.keyboard.press("Escape")
    finished(page)
    time.sleep(0.3)
    check("keyboard: Esc stops", server.metrics()["num_requests_running"] == 0)
    to("tab-text")
    page.keyboard.press("ArrowRight")
    check("keyboard: arrows switch tabs", page.locator("#chat").is_visible())
    to("open-card")
    page.keyboard.press("Enter")
    check("keyboard: the card opens", page.locator("#card").is_visible())
    page.keyboard.press("Escape")
    check("keyboard: and closes", not page.locator("#card").is_visible())


def contrast(page: Page, what: str, check: Checks) -> None:
    ratio, where = page.evaluate(CONTRAST)
    check(f"contrast at least 4.5 ({what})", ratio >= 4.5, f"{ratio:.2f} at {where!r}")


def looks(browser: Browser, url: str, check: Checks, pictures: Path) -> None:
    """Both widths, light and dark: contrast, nothing beyond the side, pictures."""
    for size in SIZES:
        for scheme in ("light", "dark"):
            with opened(browser, url, size, check, color_scheme=scheme) as page:
                page.fill("#prompt", PROMPT)
                page.fill("#seed", "7")
                page.fill("#max_tokens", "50")
                page.uncheck("#fresh")
                contrast(page, f"{size}, {scheme}, empty", check)
                page.click("#write")
                finished(page)
                contrast(page, f"{size}, {scheme}, text", check)
                wide = page.evaluate("document.documentElement.scrollWidth")
                check(f"nothing beyond the side ({size})", wide <= SIZES[size][0], wide)
                page.evaluate("scrollTo(0, 0)")
                page.locator("#new .t").nth(3).hover()
                contrast(page, f"{size}, {scheme}, tip", check)
                page.screenshot(path=pictures / f"page_{size}_{scheme}.png")
                page.click("#tab-chat")
                page.fill("#say", "Where does the river begin?")
                page.press("#say", "Enter")
                finished(page)
                contrast(page, f"{size}, {scheme}, chat", check)
                page.screenshot(path=pictures / f"page_{size}_{scheme}_chat.png")
                page.click("#open-card")
                contrast(page, f"{size}, {scheme}, card", check)
                page.screenshot(path=pictures / f"page_{size}_{scheme}_card.png")
                if size == "desk" and scheme == "light":
                    nameless = page.evaluate(NAMELESS)
                    check("everything has a name", not nameless, nameless or "")


def with_a_key(browser: Browser, check: Checks) -> None:
    """A server that wants a key, and has no chat: the page asks, and says why."""
    with ours(env={"NEO_JAX_API_KEY": KEY}) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        check("a wrong key: asked again", page.locator("#key").is_visible())
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        until(page, "document.title === 'bundled'")
        page.wait_for_load_state("networkidle")
        page.fill("#prompt", PROMPT)
        page.fill("#max_tokens", "5")
        page.click("#write")
        finished(page)
        check("with a key: writes", new_text(page) != "")
        kept = page.evaluate("[sessionStorage.length, JSON.stringify({...localStorage})]")
        check("the key is in the session alone", kept[0] == 1 and KEY not in kept[1])
        page.click("#tab-chat")
        note = page.locator("#chat-note").inner_text()
        check("no chat: it says why", "--chat-template" in note and page.is_disabled("#write"))
        page.click("#tab-text")
        page.click("#clear")
        page.fill("#prompt", "word " * 3000)
        page.click("#write")
        finished(page)
        check("an error is a message", "the context is" in page.locator("#error").inner_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, default=Path("build/page"))
    pictures = parser.parse_args().pictures
    pictures.mkdir(parents=True, exist_ok=True)
    check = Checks()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        print(f"chromium {browser.version}")
        with ours("--chat-template", "plain") as server:
            with opened(browser, server.url, "desk", check) as page:
                writing(page, server, check)
                chatting(page, check)
                history(page, server.url, check)
            with opened(browser, server.url, "desk", check) as page:
                by_keyboard(page, server, check)
            looks(browser, server.url, check, pictures)
        with_a_key(browser, check)
        browser.close()
    print(f"{check.failed} failed; pictures: {pictures}")
    return int(check.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
