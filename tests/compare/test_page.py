"""The report in a real browser: what a reader sees, clicks and reads."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from tilewise.compare import page  # noqa: E402

EXAMPLE = json.loads(Path(__file__).with_name("example_result.json").read_text(encoding="utf-8"))
HOSTILE = "<script>window.hacked=1</script></script><!--"
BREAKOUT = "</script><script>window.hacked=1</script>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
PIXELS = "return document.getElementById('tile-viewer').toDataURL()"


@pytest.fixture
def result():
    return copy.deepcopy(EXAMPLE)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    service = shutil.which("chromedriver")
    for found, name in ((browser, "chromium"), (service, "chromedriver")):
        if not found:
            pytest.skip(f"the report is not opened in a browser: {name} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=service))
    yield driver
    driver.quit()


@pytest.fixture
def reader(driver, tmp_path):
    """Opens pages; at the end of the test the console must be empty and nothing fetched."""
    driver.get("about:blank")
    driver.get_log("browser"), driver.get_log("performance")
    reader = Reader(driver, tmp_path / "report.html")
    yield reader
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert reader.complaints() == []
    assert reader.requests() == []


class Reader:
    def __init__(self, driver, path):
        self.driver, self.path = driver, path
        self.run = driver.execute_script

    def open(self, result):
        page.write(result, self.path)
        return self.show(self.path)

    def show(self, path):
        self.driver.get(path.as_uri())
        return self

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def choose(self, selector, text):
        from selenium.webdriver.support.select import Select

        Select(self.find(selector)).select_by_visible_text(text)

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        log = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"]
        outside = [url for url in sent if not url.startswith(("file:", "data:", "about:"))]
        return outside + self.run("return performance.getEntriesByType('resource').map(e => e.name)")


def order(reader):
    return reader.run(
        "return [...document.querySelectorAll('#methods-table tbody tr')].map(r => r.dataset.method)"
    )


def cells(reader, column):
    return reader.texts(f"#methods-table td[data-column='{column}']")


# --- what is said


def test_says_what_was_compared(reader, result):
    reader.open(result)
    assert reader.text("#advice") == result["advice"]
    facts = reader.text("header")
    for said in (
        result["command"],
        "Example CPU",
        "2.13.0+cpu",
        "float32",
        "4,096 tokens",
        "7 after 2",
        "bright morning",
    ):
        assert said in facts
    assert order(reader) == [m["method"] for m in result["methods"]]
    assert cells(reader, "prefill_ms")[0].startswith("812")
    assert "passkey: dense reaches 62 %" in reader.text("#methods-notes")


def test_better_and_worse_have_a_sign(reader, result):
    reader.open(result)
    speed = dict(zip(order(reader), cells(reader, "prefill_speedup"), strict=True))
    assert speed["xattention"].startswith("▲better")
    assert speed["pbs"].startswith("▼worse")
    assert speed["dense"].startswith("1.00")
    # Within the intervals nothing is claimed: recall of pbs overlaps that of dense, that of the window does not.
    recall = dict(zip(order(reader), cells(reader, "recall"), strict=True))
    assert recall["pbs"].startswith("98.0") and recall["sink_window"].startswith("▼worse")


def test_table_sorts_by_click_and_key(reader, result):
    reader.open(result)
    initial = order(reader)
    measured = {m["method"]: m["decode_ms_per_token"] for m in result["methods"]}
    known = sorted((name for name in measured if measured[name] is not None), key=measured.get)
    button = reader.find("th[data-column='decode_ms_per_token'] button")
    button.click()
    assert order(reader) == [*known, "pbs"]
    button.send_keys("\ue007")  # Enter
    assert order(reader) == [*known[::-1], "pbs"], "what was not measured stays last"
    assert reader.find("th[data-column='decode_ms_per_token']").get_attribute("aria-sort") == "descending"
    button.click()
    assert order(reader) == initial and initial[0] == "dense"


# --- the plots


def test_quality_axis(reader, result):
    reader.open(result)
    before = reader.text("#plot-quality")
    assert len(reader.all("#plot-quality .point")) == len(result["methods"])
    assert "(sink_window, xattention, dense)" in reader.text("#quality-caption")
    reader.choose("#quality-axis", "recall accuracy (%)")
    assert reader.text("#plot-quality") != before
    assert "recall accuracy" in reader.text("#plot-quality")
    # Control: a method made both fastest and best stands alone on the front.
    moba = next(m for m in result["methods"] if m["method"] == "moba")
    moba.update(prefill_ms=1.0, prefill_ms_low=0.9, prefill_ms_high=1.1, bits_per_byte_change=-1.0)
    assert "(moba)" in reader.open(result).text("#quality-caption")


def test_ranking_is_two_columns(reader, result):
    """The place of every ranked method and who outdoes it; a dash with a reason where a method has no place."""
    reader.open(result)
    found = dict(zip(order(reader), zip(cells(reader, "rank"), cells(reader, "outdone_by"))))
    assert [entry["method"] for entry in result["ranking"]] == [
        name
        for name, (place, _) in sorted(found.items(), key=lambda item: item[1][0])
        if not place.startswith("–")
    ]
    assert found["xattention"] == ("1", "none") and found["pbs"] == ("3", "xattention, dense")
    assert found["sink_window"][0].startswith("–")
    del result["ranking"]
    assert cells(reader.open(result), "rank") == [], "older results have none"


def test_latency_marks_crossovers(reader, result):
    reader.open(result)
    points = sum(len(row["methods"]) for row in result["lengths"])
    assert len(reader.all("#plot-latency .point")) == points
    assert len(reader.all("#plot-latency .crossover")) == 3
    assert "pbs: no length at which it pays" in reader.text("#crossovers")
    result["crossovers"][0]["tokens"] = 50_000
    reader.open(result)
    assert len(reader.all("#plot-latency .crossover")) == 2
    assert "50,000 tokens, outside the lengths drawn" in reader.text("#crossovers")


def test_heatmap_shows_the_chosen_map(reader, result):
    def expected(method, task):
        found = next(m for m in result["heatmap"] if (m["method"], m["task"]) == (method, task))
        return sorted(f"{100 * cell['accuracy']:.3g}" for cell in found["cells"])

    reader.open(result)
    assert sorted(reader.texts("#heatmap .number")) == expected("dense", "recall")
    reader.choose("#heatmap-method", "sink_window")
    assert sorted(reader.texts("#heatmap .number")) == expected("sink_window", "recall")
    reader.choose("#heatmap-task", "copy")
    assert sorted(reader.texts("#heatmap .number")) == expected("sink_window", "copy")
    assert expected("sink_window", "copy") != expected("sink_window", "recall")


# --- the tile maps


def place(maps, layer, head, method=None):
    kind = maps["kept" if method else "mass"]
    return next(m for m in kind if (m["layer"], m["head"], m.get("method")) == (layer, head, method))


def figures(maps, layer, head, method):
    """Density and covered share in per cent, from the bytes of a causal map of the same grid as its mass."""
    mass, kept = place(maps, layer, head), place(maps, layer, head, method)
    shape = mass["rows"], mass["cols"]
    share = (np.frombuffer(base64.b64decode(mass["data"]), np.uint8).reshape(shape) / 255.0) ** 2
    share /= share.sum(1, keepdims=True)
    bits = np.frombuffer(base64.b64decode(kept["bits"]), np.uint8)
    on = np.unpackbits(bits)[: share.size].reshape(shape).astype(bool)
    visible = np.tril(np.ones(shape, bool))
    return [f"{100 * on[visible].mean():.3g}", f"{100 * (share * on).sum() / shape[0]:.3g}"]


def test_tile_viewer(reader, result):
    reader.open(result)
    seen = []
    for selector, choice in (
        ("#tile-method", "xattention"),
        ("#tile-layer", "3"),
        ("#tile-head", "2"),
        ("#tile-method", "pbs"),
    ):
        reader.choose(selector, choice)
        seen.append((reader.text("#tile-info"), reader.run(PIXELS)))
    for part in zip(*seen, strict=True):
        assert len(set(part)) == len(seen), "each choice changes what is said and what is drawn"
    assert "Layer 3, head 2, pbs" in seen[-1][0]
    said = re.findall(r"([\d.]+) % of", seen[-1][0])
    assert said == figures(result["tile_maps"], 3, 2, "pbs")


def test_tile_viewer_by_hand_and_key(reader, result):
    from selenium.webdriver import ActionChains, Keys

    reader.open(result)
    reader.find("#tile-thumbs button[data-layer='5'][data-head='1']").click()
    assert reader.text("#tile-info").startswith("Layer 5, head 1,")
    canvas, side = reader.find("#tile-viewer"), place(result["tile_maps"], 5, 1)["rows"]
    width, calm = canvas.size["width"], reader.run(PIXELS)
    middle = (4.5 / side - 0.5) * width, (20.5 / side - 0.5) * width
    ActionChains(reader.driver).move_to_element_with_offset(canvas, *map(round, middle)).perform()
    said = reader.text("#tile-hover")
    assert said.startswith("Query tile 20 (tokens 2,560–2,687), key tile 4 (tokens 512–639): ")
    assert re.search(r"[\d.]+ % of the row's mass, (not )?chosen\.", said)
    assert reader.run(PIXELS) != calm
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert reader.text("#tile-hover").startswith("Query tile 21 (tokens 2,688–2,815), key tile 3 ")
    canvas.send_keys(*[Keys.ARROW_RIGHT] * 25)
    assert reader.text("#tile-hover").endswith("in the future, not visible.")


def test_maps_of_another_grid_are_drawn_on_the_same_square(reader, result):
    reader.open(result)
    reader.choose("#tile-method", "moba")
    assert "the grids differ" in reader.text("#tile-info")
    share = float(re.search(r"covering ([\d.]+) %", reader.text("#tile-info"))[1])
    assert 0 < share < 100
    # Control: the same map with every bit set covers everything.
    kept = place(result["tile_maps"], 0, 0, "moba")
    kept["bits"] = base64.b64encode(b"\xff" * (kept["rows"] * kept["cols"] // 8)).decode()
    reader.open(result).choose("#tile-method", "moba")
    assert "density 100 % of the visible tiles, covering 100 %" in reader.text("#tile-info")


def test_control_a_swapped_map_is_noticed(reader, result):
    reader.open(result).choose("#tile-method", "pbs")
    before = reader.text("#tile-info"), reader.run(PIXELS)
    mine, other = (place(result["tile_maps"], 0, 0, name) for name in ("pbs", "sink_window"))
    mine["bits"], other["bits"] = other["bits"], mine["bits"]
    reader.open(result).choose("#tile-method", "pbs")
    assert reader.text("#tile-info") != before[0]
    assert reader.run(PIXELS) != before[1]


def test_damaged_map_is_named(reader, result):
    place(result["tile_maps"], 0, 0, "pbs")["bits"] = "AAAA"
    place(result["tile_maps"], 0, 1, "pbs")["bits"] = "not base64!"
    reader.open(result).choose("#tile-method", "pbs")
    assert "no readable tile map of pbs" in reader.text("#tile-info")
    reader.choose("#tile-head", "1")
    assert "no readable tile map of pbs" in reader.text("#tile-info")


# --- what can go wrong


def poison(result, text):
    """Put `text` wherever a model, a file or a user could have put words."""
    for target, name in ((result, "advice"), (result, "command"), (result["machine"], "cpu")):
        target[name] = text
    result["settings"].update(model=text, text=text, text_preview=text)
    result["task_notes"] = {text: text}
    result["methods"][1].update(
        method=text, engine=text, paper={"id": 1, "title": text}, parameters={text: text}
    )
    result["methods"][1].update(peak_mb=None, reasons={"peak_mb": text})
    result["methods"][1]["tasks"][text] = {"accuracy": 1.0, "low": 0.9, "high": 1.0, "n": 9}
    result["lengths"][0]["methods"][text] = {"ms": 1.0, "low": 1.0, "high": 1.0}
    result["crossovers"][0].update(method=text, note=text)
    result["ranking"][0].update(method=text, outdone_by=[text])
    result["heatmap"][0].update(method=text, task=text)
    for kept in result["tile_maps"]["kept"]:
        if kept["method"] == "sink_window":
            kept["method"] = text
    return result


@pytest.mark.parametrize(
    "text", [HOSTILE, BREAKOUT, '"><img src=x onerror="window.hacked=1">', "$css $script $$"]
)
def test_hostile_text_is_text(reader, result, text):
    reader.open(poison(result, text))
    assert reader.text("#advice") == text
    assert text in order(reader)
    assert f"“{text}”" in reader.texts("#facts dd")
    reader.choose("#tile-method", text)
    assert f"Layer 0, head 0, {text}: density" in reader.text("#tile-info")
    assert text in reader.text("#methods-notes") and text in reader.text("#crossovers")
    assert reader.run("return window.hacked") is None
    assert reader.run("return document.querySelectorAll('script, img').length") == 2


def test_control_unescaped_text_would_run(driver, result, tmp_path):
    path = tmp_path / "unsafe.html"
    text = page.render(poison(result, BREAKOUT)).replace("\\u003c", "<").replace("\\u003e", ">")
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    driver.get(path.as_uri())
    assert driver.execute_script("return window.hacked") == 1


def test_partial_banner(reader, result):
    reader.open(result)
    assert not reader.find("#partial-banner").is_displayed()
    result["partial"] = True
    reader.open(result)
    assert reader.find("#partial-banner").is_displayed()
    assert "measured in part: interrupted" in reader.text("#partial-banner").lower()


def test_nulls_are_dashes_with_a_reason(reader, result):
    reader.open(result)
    dash = reader.find("tr[data-method='pbs'] td[data-column='peak_mb'] .null")
    assert dash.text == "–" and dash.get_attribute("title") == "the process shares its peak"
    assert "the process shares its peak" in reader.texts("#methods-notes li")


def nullify(value):
    if isinstance(value, dict):
        return {key: nullify(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nullify(item) for item in value]
    return None if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def test_any_number_may_be_null(reader, result):
    for part in ("machine", "settings", "methods", "crossovers"):
        result[part] = nullify(result[part])
    for row in result["lengths"]:
        row["methods"] = nullify(row["methods"])
    for heat in result["heatmap"]:
        for cell in heat["cells"]:
            cell["accuracy"] = None
    reader.open(result)
    assert set(cells(reader, "kl_mean")) == {"–1"}
    assert "not measured" in reader.texts("#methods-notes li")
    assert set(reader.texts("#heatmap .number")) == {"–"}
    assert len(reader.texts(".missing")) == 2


def test_missing_sections_leave_one_line(reader, result):
    result.update(lengths=[], crossovers=[], heatmap=[], tile_maps={})
    reader.open(result)
    for name in ("plot-latency", "heatmap", "tile-viewer"):
        assert reader.all(f"#{name}") == []
    lines = " ".join(reader.texts(".missing"))
    assert "more than one length" in lines and "No heat map" in lines and "No tile maps" in lines
    reader.open({"methods": [], "partial": True})
    assert "before the interruption" in " ".join(reader.texts(".missing"))


def test_phone_and_dark(reader, result):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    reader.open(result)
    assert reader.run("return document.documentElement.scrollWidth") <= 390, "only the table scrolls sideways"
    light = reader.run(PIXELS), reader.run("return getComputedStyle(document.body).backgroundColor")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    for _ in range(60):  # the page hears of it, and repaints, frames later
        reader.run("return new Promise(requestAnimationFrame)")
        if reader.run(PIXELS) != light[0]:
            break
    assert reader.run(PIXELS) != light[0]
    assert reader.run("return getComputedStyle(document.body).backgroundColor") != light[1]


# --- the file


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="result">(.*?)</script>', text, re.S)[1])


def test_page_carries_the_whole_result(result):
    text = page.render(result)
    assert embedded(text) == result
    assert embedded(page.render(poison(copy.deepcopy(result), HOSTILE)))["advice"] == HOSTILE
    assert len(text) < 300_000
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}


def test_not_finite_is_null(result):
    result["methods"][1]["kl_mean"] = float("nan")
    result["methods"][2]["kl_mean"] = float("inf")
    methods = embedded(page.render(result))["methods"]
    assert [m["kl_mean"] for m in methods[1:3]] == [None, None]


@pytest.mark.parametrize("wrong", [{}, {"methods": None}, [], None])
def test_not_a_result(wrong):
    with pytest.raises(ValueError, match="result: expected a compare result"):
        page.render(wrong)


def test_write_replaces_whole(tmp_path, result):
    path = tmp_path / "report.html"
    path.write_text("older")
    page.write(result, path)
    assert path.read_text(encoding="utf-8") == page.render(result)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["_read", "os.replace"])
def test_failed_write_leaves_the_older_file(tmp_path, result, monkeypatch, broken):
    path = tmp_path / "report.html"
    path.write_text("older")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(f"{page.__name__}.{broken}", fail)
    with pytest.raises(OSError, match="no space left"):
        page.write(result, path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_unusable_folder(tmp_path, result):
    file = tmp_path / "file"
    file.write_text("older")
    with pytest.raises(OSError):
        page.write(result, file / "report.html")
    assert file.read_text() == "older"
