"""The report page in a real browser, from the disk: it draws, filters, follows links, and asks no network."""

import json
import os
import shutil

import numpy as np
import pytest
from environments import environment, run

from interventions.statistics import paired
from interventions.trace import __main__ as trace
from vlm_jax.runs.page import write_page

pytestmark = pytest.mark.peers

#: Opens a page and does what a reader does; prints what it saw as JSON.
IN_BROWSER = """
import json, sys, time
from playwright.sync_api import sync_playwright

page_file, browser_path, sample, shot = sys.argv[1:]
seen = {"errors": [], "requests": []}
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 800}, accept_downloads=True)
    page.on("console", lambda message: message.type == "error" and seen["errors"].append(message.text))
    page.on("pageerror", lambda error: seen["errors"].append(str(error)))
    page.on("request", lambda request: seen["requests"].append(request.url.partition(":")[0]))
    begun = time.monotonic()
    page.goto(f"file://{page_file}")
    page.wait_for_selector("html[data-ready=yes]")
    seen["seconds"] = time.monotonic() - begun
    seen["marks"] = page.locator(".chart svg .mark-rect path").count()
    page.locator(".chart svg .mark-rect path").first.click()
    seen["chosen"] = page.locator(".chosen").all_inner_texts()
    cells = page.locator(".rows").filter(has=page.locator(".chosen")).first
    seen["cells"] = sorted(set(cells.locator("tbody > tr > td:first-child").all_inner_texts()))
    seen["described"] = page.locator(".chart [aria-label]").count()
    rows = page.locator(".samples table.dataTable > tbody > tr")
    seen["rows"] = rows.count()
    drawn = "[...document.querySelectorAll('img.picture')].filter((image) => image.naturalWidth).length"
    seen["pictures"] = page.evaluate(drawn)
    seen["lists"] = page.locator("label.cells select").count()
    page.locator("label.cells select").first.select_option("L2-mlp")
    seen["listed"] = page.locator(".chosen").first.inner_text()
    page.get_by_label("only wrong answers").first.check()
    seen["wrong"] = rows.all_inner_texts()
    page.get_by_label("only wrong answers").first.uncheck()
    rows.first.focus()
    page.keyboard.press("Enter")
    seen["opened"] = page.locator(".detail").count()
    tokens = page.locator(".tokens").first
    tokens.locator(".text button").last.click()
    page.mouse.move(0, 0)
    seen["token"] = tokens.locator(".text button").last.get_attribute("title")
    seen["deepest"] = tokens.locator("output").inner_text()
    tokens.locator("input[type=range]").first.fill("0")
    seen["token of layer 0"] = tokens.locator(".text button").last.get_attribute("title")
    seen["cells"] = [seen["cells"], tokens.locator(".grid button").count()]
    page.goto(f"file://{page_file}#sample={sample}")
    page.wait_for_selector("tr.linked")
    seen["linked"] = page.locator("tr.linked").inner_text()
    page.locator("#theme").click()
    seen["dark"] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.screenshot(path=shot)
    page.locator(".vega-embed summary").first.click()
    with page.expect_download() as download:
        page.get_by_text("Save as SVG").first.click()
    with open(download.value.path()) as file:
        seen["svg"] = file.read(4)
    browser.close()
print(json.dumps(seen))
"""


@pytest.mark.parametrize("count", [1, 2])
def test_traces_in_chromium(tmp_path, count):
    """A page of one run, and of two side by side."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on the PATH, and CHROMIUM names none")
    folders = [tmp_path / str(number) for number in range(count)]
    for number, folder in enumerate(folders):
        trace.main(trace.Args(limit=24, noise_scale=2.0 - number, positions=("each",), out=folder))
    page = write_page(folders[0], other=folders[1] if count == 2 else None, paired=paired)
    records = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
    python = environment(tmp_path / "environment", "playwright==1.65.2")
    (tmp_path / "script.py").write_text(IN_BROWSER)
    sample = records[17]["id"]
    seen = json.loads(run(python, tmp_path / "script.py", page, browser, sample, tmp_path / "dark.png"))
    assert seen["errors"] == [] and set(seen["requests"]) <= {"file", "blob", "data"}
    assert seen["chosen"] == ["only the cell L0-attn show all"] * (3 * count) and seen["cells"] == [["L0-attn"], 16]
    with np.load(folders[0] / "token_maps/arrays.npz") as arrays:
        values = arrays["0"].astype(float)  # (layers, modules, tokens)
    layer = int(np.abs(values).max((1, 2)).argmax())
    assert seen["deepest"] == str(layer)
    for name, at in (("token", layer), ("token of layer 0", 0)):
        assert abs(float(seen[name].split()[-1]) - values[at, 0, -1]) <= 0.01 * abs(values[at, 0, -1])
    assert seen["marks"] >= 16 and seen["described"] and seen["rows"] == seen["pictures"] == 10 * count
    assert seen["lists"] == (2 if count == 1 else 5) and seen["listed"] == "only the cell L2-mlp show all"
    wrong = [record["id"] for record in records if not record["correct"]]
    assert wrong and len(seen["wrong"]) == len(wrong) + 10 * (count - 1)  # the filter of the first table
    assert all(name in text for name, text in zip(wrong, seen["wrong"], strict=False))
    assert seen["opened"] == 1 and sample in seen["linked"]
    assert seen["dark"] == "rgb(22, 24, 28)" and seen["svg"] == "<svg"
    assert seen["seconds"] < 30
