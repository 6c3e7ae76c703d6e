"""Static export with the real writer: SVG, PDF and PNG that hold what the figure holds."""

import re
import shutil
import struct
from xml.etree import ElementTree

import pytest
from evaluation_synthetic import POLICIES, plausible

from biscale_env import plots
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.plots.figure_files import PNG_SCALE

pytest.importorskip("kaleido", reason="needs the extra 'print': pip install 'biscale-env[print]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))),
        reason="needs Chromium on the path",
    ),
]
WIDTH_PX, HEIGHT_PX = 700, 420


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    with RunDirectory(path, {}) as directory:
        for policy in POLICIES:
            for seed in (0, 1):
                directory.add(plausible("prefill", policy, seed, duration_s=60.0))
    return load_run(path)


def test_svg_holds_titles_labels_and_intervals_as_text_and_paths(run, tmp_path):
    path = plots.save(plots.energy(run), tmp_path / "energy.svg", WIDTH_PX, HEIGHT_PX)
    root = ElementTree.parse(path).getroot()
    assert (root.get("width"), root.get("height")) == (str(WIDTH_PX), str(HEIGHT_PX))
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*POLICIES} <= {t for text in texts for t in re.split(r"[,\s]+", text)}
    classes = [node.get("class") or "" for node in root.iter()]
    assert sum("errorbar" in name.split() for name in classes) >= len(POLICIES)  # 95 % intervals
    ground = next(node for node in root.iter() if node.get("class") == "main-svg" or node is root)
    assert "rgb(255, 255, 255)" in ElementTree.tostring(ground, encoding="unicode")


def test_png_is_large_enough_for_print_and_pdf_is_one_page_of_vectors(run, tmp_path):
    figure = plots.latency(run)
    png = plots.save(figure, tmp_path / "latency.png", WIDTH_PX, HEIGHT_PX).read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (PNG_SCALE * WIDTH_PX, PNG_SCALE * HEIGHT_PX)
    pdf = plots.save(figure, tmp_path / "latency.pdf", WIDTH_PX, HEIGHT_PX).read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") == 1
    box = re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert float(box[1]) / float(box[2]) == pytest.approx(WIDTH_PX / HEIGHT_PX, rel=0.02)
    assert b"/Font" in pdf  # letters stay letters
    assert b"/Subtype /Image" not in pdf
