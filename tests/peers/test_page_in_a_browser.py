"""The report page in a real browser, from the disk: it draws, filters, follows links, and asks no network."""

import json
import os
import shutil

import numpy as np
import pytest
from environments import environment, run

from eval import accuracy
from interventions.diff import __main__ as diff
from interventions.flow import __main__ as flow
from interventions.lens import __main__ as lens
from interventions.statistics import paired
from interventions.talo import __main__ as talo
from interventions.trace import __main__ as trace
from train import edit, lora, register, sae
from train.study import __main__ as study
from train.study.placement.options import Args as PlacementArgs
from vlm_jax.runs.page import write_page

pytestmark = pytest.mark.peers

#: The beginning of a script: the browser, and a page whose errors and requests are noted.
OPENED = """
import json, sys, time
from playwright.sync_api import sync_playwright

seen = {"errors": [], "requests": []}

def opened(browser, page_file):
    page = browser.new_page(viewport={"width": 1100, "height": 800}, accept_downloads=True)
    page.on("console", lambda message: message.type == "error" and seen["errors"].append(message.text))
    page.on("pageerror", lambda error: seen["errors"].append(str(error)))
    page.on("request", lambda request: seen["requests"].append(request.url.partition(":")[0]))
    begun = time.monotonic()
    page.goto(f"file://{page_file}")
    page.wait_for_selector("html[data-ready=yes]")
    seen["seconds"] = time.monotonic() - begun
    return page
"""

#: Opens a page and does what a reader does; prints what it saw as JSON.
IN_BROWSER = (
    OPENED
    + """
page_file, browser_path, sample, shot = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
    page = opened(browser, page_file)
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
    page.locator("label.cells select").first.select_option("the cell L2-mlp")
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
)


#: Opens the page of any run: draws, opens the group of samples, chooses an estimate from a chart's list, filters.
ANY_RUN = (
    OPENED
    + """
page_file, browser_path, estimate, sample, shot = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
    page = opened(browser, page_file)
    seen["problems"] = page.locator(".problems li").all_inner_texts()
    charts = page.locator(".chart:visible")
    seen["drawn"] = [charts.count(), page.locator(".chart:visible:has(svg.marks)").count()]
    seen["tables"] = page.locator("table.dataTable:visible").count()
    groups = page.locator("details.group > summary", has_text="samples.jsonl in")
    if groups.count():
        groups.click()
        page.wait_for_selector("details.group[open] img.picture")
    drawn = "[...document.querySelectorAll('img.picture, .tokens img')].filter((image) => image.naturalWidth).length"
    seen["pictures"] = page.evaluate(drawn)
    estimates = page.locator("label.cells select", has_text=estimate).first
    if estimate:
        parts = page.locator("main section:visible:has(.samples)")
        before = parts.count()
        names = estimates.locator("option").all_inner_texts()
        estimates.select_option(next(name for name in names if estimate in name))
        seen["chosen"] = page.locator(".chosen").first.inner_text()
        seen["parts"] = [before, parts.count()]
        page.locator(".chosen button").first.click()
        seen["parts"].append(parts.count())
    wrong = page.get_by_label("only wrong answers")
    if wrong.count():
        table = page.locator(".samples:visible").filter(has=page.locator("label", has_text="only wrong")).first
        column = 1 + table.locator("thead th").all_inner_texts().index("correct")
        table.get_by_label("only wrong answers").check()
        seen["wrong"] = sorted(set(table.locator(f"tbody > tr > td:nth-child({column})").all_inner_texts()))
        table.get_by_label("only wrong answers").uncheck()
    page.locator("#theme").click()
    if groups.count():  # closed, so that the link has to open it
        groups.click()
        page.wait_for_selector("details.group:not([open]) .samples", state="hidden")
    if sample:
        page.goto(f"file://{page_file}#sample={sample}")
        page.wait_for_selector("tr.linked", state="visible")
        seen["linked"] = page.locator("tr.linked").inner_text()
    page.screenshot(path=shot, full_page=True)
    browser.close()
print(json.dumps(seen))
"""
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with playwright."""
    return environment(tmp_path_factory.mktemp("playwright"), "playwright==1.65.2")


def chromium() -> str:
    """The browser's program; skips the test without one."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on the PATH, and CHROMIUM names none")
    return browser


def _flow(out):
    flow.main(flow.Args(limit=8, out=out))


def _lens(out):
    lens.main(lens.Args(limit=8, out=out))


def _talo(out):
    talo.main(talo.Args(limit=30, out=out))


def _accuracy(out):
    accuracy.main(accuracy.Args(limit=12, out=out))


def _lora(out):
    lora.main(lora.Args(train="16", eval="8", trace="8", baselines=False, out=out))


def _edit(out):
    edit.main(edit.Args(train=("mini-docvqa",), limit=16, eval_limit=8, epochs=1, out=out))


def _register(out):
    register.main(register.Args(registers=2, train=("mini-docvqa",), limit=16, eval_limit=8, epochs=1, out=out))


def _study(out):
    placements = {"placements": ("task_diff", "random"), "k": (2,), "seeds": (0,), "random_seeds": (0, 1)}
    sizes = {"trace": 8, "train": 8, "eval": 8, "alone": False, "corruptions": ()}
    study.main(PlacementArgs(models=("mini-qwen3-vl",), **sizes, **placements, out=out))


def _diff(out):
    options = {
        "task": ("mini-vsr",),
        "limit": 60,
        "eval_limit": 16,
        "latents": 64,
        "layers": (2,),
        "k": 4,
        "batch": 256,
    }
    sae.main(sae.Args(model="mini-llava-text", images=False, **options, out=out / "base"))
    sae.main(sae.Args(model="mini-llava", init=str(out / "base"), **options, out=out / "adapted"))
    # Every latent is let through the filters, because those of so short a training stand for nothing.
    filters = {"percentile": 50.0, "least_energy": 1e-9, "least_ratio": 1.01, "least_difference": 0.0, "level": 0.99}
    sizes = {"limit": 48, "features": 2, "head_limit": 2}
    folders = {"base": out / "base", "adapted": out / "adapted", "out": out / "diff"}
    diff.main(diff.Args(model="mini-llava", **folders, **filters, **sizes))
    return out / "diff"


@pytest.mark.parametrize(
    ("make", "estimate"),
    [
        (_flow, ""),
        (_lens, ""),
        (_talo, ""),
        (_accuracy, ""),
        (_lora, ""),
        (_edit, "after"),
        (_register, "untuned"),
        (_study, "baseline"),
        (_diff, ""),
    ],
)
def test_every_kind_of_run_in_chromium(tmp_path, python, make, estimate):
    """Its charts are drawn, its samples have their pictures, and an estimate shows the samples behind it alone."""
    browser = chromium()
    folder = make(tmp_path / "run") or tmp_path / "run"
    page = write_page(folder)
    lines = [path.read_text().splitlines() for path in sorted(folder.rglob("samples.jsonl"))]
    sample = json.loads(lines[0][1])["id"] if lines else ""
    (tmp_path / "script.py").write_text(ANY_RUN)
    seen = json.loads(run(python, tmp_path / "script.py", page, browser, estimate, sample, tmp_path / "page.png"))
    assert seen["errors"] == seen["problems"] == [] and set(seen["requests"]) <= {"file", "blob", "data"}
    assert seen["drawn"][0] == seen["drawn"][1] >= (make is not _accuracy)
    assert seen["tables"] and seen["pictures"]
    assert seen.get("wrong", ["false"]) == ["false"] and sample in seen.get("linked", "")
    if estimate:
        before, chosen, after = seen["parts"]
        assert seen["chosen"].startswith("only samples of") and estimate in seen["chosen"]
        assert 0 < chosen < before == after
    assert page.stat().st_size < 8 * 2**20 and seen["seconds"] < 30


@pytest.mark.parametrize("count", [1, 2])
def test_traces_in_chromium(tmp_path, python, count):
    """A page of one run, and of two side by side."""
    browser = chromium()
    folders = [tmp_path / str(number) for number in range(count)]
    for number, folder in enumerate(folders):
        trace.main(trace.Args(limit=24, noise_scale=2.0 - number, positions=("each",), out=folder))
    page = write_page(folders[0], other=folders[1] if count == 2 else None, paired=paired)
    records = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
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
