"""The dashboard as a person meets it: in headless Chromium, with every error of the console."""

import itertools
import json
import shutil
import threading
from contextlib import contextmanager

import pytest
from evaluation_synthetic import plausible

from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.plots.window_figure import WHOLE_PX

pytest.importorskip(
    "dash", reason="needs the extra 'dashboard': pip install 'biscale-env[dashboard]'"
)
playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path"),
]
POLICIES = ("max", "mpc", "slack")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboard") / "run"
    with RunDirectory(path, {}) as directory:
        for phase in ("prefill", "decode"):
            for policy in POLICIES:
                directory.add(plausible(phase, policy, 0, duration_s=120.0))
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser, folder):
    """A page of the dashboard, and what its console complained of."""
    from werkzeug.serving import make_server

    from biscale_env.dashboard.web_app import make_app

    server = make_server("127.0.0.1", 0, make_app(folder).server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    page = browser.new_page(viewport={"width": 1400, "height": 1900})
    page.set_default_timeout(300_000)  # a machine may be busy
    wrong = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda r: wrong.append(f"not loaded: {r.url}") if lost(r) else None)
    page.on("request", lambda r: wrong.append(f"asked for {r.url}") if outside(r.url) else None)
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        yield page, wrong
    finally:
        page.close()
        server.shutdown()
        thread.join(10)


def lost(request):
    """Whether a request failed, and not because the page was left meanwhile."""
    return request.failure != "net::ERR_ABORTED"


def outside(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def drawn(page, where):
    """Traces and range of time of a drawn figure, as Plotly has them in the page."""
    script = f"""() => {{
        const g = document.querySelector('{where} .js-plotly-plot');
        return g && g._fullData && {{
            names: g._fullData.map(t => t.name), range: g.layout.xaxis.range,
            y: g._fullData.map(t => Array.from(t.y || []).filter(v => v !== null).length),
            titles: (g.layout.annotations || []).map(a => a.text)}};
    }}"""
    return page.evaluate(script)


def until(page, condition):
    """Wait for it; what a page does not have yet is no error."""
    page.wait_for_function(f"() => {{ try {{ return {condition} }} catch {{ return false }} }}")


def test_scrubbing_a_run(run, browser, tmp_path):
    with opened(browser, run) as (page, wrong):
        until(
            page, "document.querySelectorAll('#windows .js-plotly-plot .scatterlayer').length > 9"
        )
        assert page.title() == "run · biscale"
        assert page.locator("#windows h2").all_inner_texts() == ["prefill", "decode"]
        boxes = [page.locator(f"#{k}").bounding_box() for k in ("whole", "told", "spent")]
        for above, below in itertools.pairwise(boxes):
            assert above["y"] + above["height"] <= below["y"]  # nothing lies on the figure
        assert boxes[0]["height"] == WHOLE_PX
        first = drawn(page, "#windows")
        assert first["range"] == [0, 30]
        assert {"<b>max</b>"} < set(first["titles"])
        assert min(first["y"]) > 0
        table = page.locator("#spent").inner_text()

        thumb = page.locator("#start [role=slider], .dash-slider-thumb").first
        thumb.focus()
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        until(page, "document.querySelector('#told').innerText.startsWith('12.0 to 42.0')")
        until(
            page,
            "document.querySelector('#windows .js-plotly-plot').layout.xaxis.range[0] === 12",
        )
        moved = drawn(page, "#windows")
        assert moved["range"] == [12, 42]
        assert page.locator("#spent").inner_text() != table
        shaded = "document.querySelector('#whole .js-plotly-plot').layout.shapes[0].x0"
        assert page.evaluate(shaded) == 12

        page.click("#play")
        until(page, f"{shaded} > 15")
        page.click("#play")
        until(page, "document.querySelector('#play').innerText === 'Play'")
        page.screenshot(path=str(tmp_path / "run.png"), full_page=True)
    assert wrong == []


def write_evaluations(folder, count):
    rows = [f"{512 * k},{1.5 - 0.1 * k},0.{70 - k},0.99" for k in range(count)]
    head = "step,score,energy_ratio:a,attainment:a"
    (folder / "evaluations.csv").write_text("\n".join([head, *rows]) + "\n")


def test_following_a_training_run(browser, tmp_path):
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "observation.txt").write_text("x\n")
    (folder / "config.yaml").write_text("total_timesteps: 2048\n")
    with opened(browser, folder) as (page, wrong):
        until(page, "document.querySelector('#training-told').innerText == 'no evaluation yet'")
        for count in (2, 4):
            write_evaluations(folder, count)
            until(
                page,
                "(document.querySelector('#curve-score .js-plotly-plot')?._fullData?.at(-1)"
                f".y.length ?? 0) == {count}",
            )
        told = page.inner_text("#training-told")
        assert told.startswith("1,536 of 2,048 steps, best score 1.2000")
        page.screenshot(path=str(tmp_path / "training.png"), full_page=True)
    assert wrong == []


def test_following_a_replay_until_its_results_are_there(run, browser, tmp_path):
    pytest.importorskip("zmq", reason="needs the extra 'hw'")
    folder = tmp_path / "replay"
    (folder / "raw").mkdir(parents=True)

    def add(name, rows):
        with (folder / "raw" / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def second(t):
        groups = ("decode", "prefill")
        power = [{"time_s": t, "group": g, "freq_mhz": 900.0 + t, "power_w": 300.0} for g in groups]
        add("live.jsonl", power)
        add("requests.jsonl", [request(t)])
        add("iterations.jsonl", [iteration(t, "decode")])

    with opened(browser, folder) as (page, wrong):
        for t in (100.0, 101.0):
            second(t)
        until(page, "document.querySelector('#replay-told').innerText.startsWith('2 requests')")
        until(page, "document.querySelector('#replay-figure .js-plotly-plot')?.data?.length == 8")
        second(102.0)
        until(page, "document.querySelector('#replay-told').innerText.startsWith('3 requests')")
        until(
            page,
            "document.querySelector('#replay-figure .js-plotly-plot')._fullData[0].x.length == 3",
        )
        page.screenshot(path=str(tmp_path / "replay.png"), full_page=True)
        for path in run.iterdir():
            if path.is_file():
                shutil.copy(path, folder / path.name)
        page.click("text=The replay has ended")
        until(page, "document.querySelectorAll('#windows .js-plotly-plot').length == 2")
    assert wrong == []


def request(t):
    return {
        "index": int(t),
        "scheduled_s": t - 0.5,
        "dispatched_s": t - 0.5,
        "prefill_done_s": t - 0.3,
        "decode_sent_s": t - 0.3,
        "first_chunk_s": t - 0.2,
        "last_chunk_s": t,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "error": "",
    }


def iteration(t, phase):
    names = ("prefill_requests", "prefill_tokens", "prefill_kv_tokens", "decode_requests")
    counts = dict.fromkeys((*names, "decode_kv_tokens", "queued_requests", "counter"), 3)
    times = {"time_s": t, "heard_s": t, "wall_time_s": t}
    return {"phase": phase, "kv_use": None} | times | counts
