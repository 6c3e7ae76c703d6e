"""The last seconds as text and as a picture."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.render.screen import RENDER_MODES, Screen
from biscale_env.render.strips import Recent, Strip, rounded_up
from biscale_env.render.text_screen import CLEAR, text_frame

IDS = ["BiScale/Prefill-v1", "BiScale/Decode-v1", "BiScale/PrefillDiscrete-v1"]
SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 6.0}


def recent() -> Recent:
    shown = Recent("title", [Strip("a", "load", high=4.0), Strip("b", "slack", -1, 1, 0.0)], 10.0)
    for k in range(20):
        shown.add(k, k + 1.0, {"a": k % 4, "b": np.nan if k == 19 else -0.5, "misses": k == 15.0})
    return shown


def test_only_the_last_seconds_are_kept_but_misses_are_counted_from_the_start() -> None:
    shown = recent()
    assert [step.begin_s for step in shown.steps] == list(range(9, 20))
    assert shown.misses == 1
    assert shown.now_s == 20
    shown.clear()
    assert (len(shown.steps), shown.misses, shown.now_s) == (0, 0, 0)


def test_text_shows_every_strip_and_the_second_of_a_miss() -> None:
    lines = text_frame(recent(), columns=20).splitlines()
    assert len(lines) == 4
    bars = lines[1].split("|")[1]
    assert len(bars) == 20
    assert bars == "".join("▁▁▂▂▄▄▆▆"[2 * (k % 4) : 2 * (k % 4) + 2] for k in range(10, 20))
    slack = lines[2].split("|")[1]
    assert slack.endswith("  ")  # nothing to show in the last second
    assert slack[:-2] == "▂" * 18
    marks = lines[3].split("|")[1]
    assert marks.index("x") == 12  # 16 s of 10 to 20, a column is half a second
    assert text_frame(Recent("empty", [Strip("a", "load")]))


def test_the_heading_counts_the_whole_episode_and_the_newest_value_stands_beside_its_strip() -> (
    None
):
    shown = Recent("title", [Strip("a", "load", digits=1)], span_s=2.0)
    assert shown.headline() == "title   t = 0.00 s   0 of 0 requests missed the SLO"
    assert shown.latest(shown.strips[0]) == "-"
    for k in range(5):
        value = np.nan if k == 4 else 1000.0 + k
        shown.add(k, k + 1.0, {"a": value, "misses": k == 0, "finished": 2.0})
    assert shown.headline() == (
        "title   t = 5.00 s   1 of 10 requests missed the SLO (90.0 % in time)"
    )
    assert shown.latest(shown.strips[0]) == "1,003.0"
    shown.clear()
    shown.add(0.0, 1.0, {"finished": 1.0})
    assert shown.headline().endswith("0 of 1 requests missed the SLO (100.0 % in time)")


@pytest.mark.parametrize(
    ("strip", "values", "ends"),
    [
        (Strip("a", "load"), [], (0.0, 1.0)),
        (Strip("a", "load"), [3.0, np.nan], (0.0, 5.0)),
        (Strip("a", "load", high=4.0), [3.0], (0.0, 4.0)),
        (Strip("a", "load", high=4.0), [7.0, 1.0], (0.0, 7.0)),
        (Strip("a", "slack", -1.0, 1.0), [-3.0, 0.5], (-3.0, 1.0)),
        (Strip("a", "clock", 600.0, 600.0), [600.0], (600.0, 601.0)),
    ],
)
def test_an_axis_holds_every_value_and_is_never_empty(strip, values, ends) -> None:
    shown = Recent("t", [strip])
    for k, value in enumerate(values):
        shown.add(k, k + 1.0, {"a": value})
    assert shown.axis(strip) == ends


def test_text_shows_the_newest_step_of_a_column_and_something_at_the_lowest_value() -> None:
    shown = Recent("t", [Strip("a", "load", 0.0, 8.0)], span_s=4.0)
    for k, value in enumerate((0.0, 8.0, 4.0, 2.0)):
        shown.add(k, k + 1.0, {"a": value})
    line = text_frame(shown, columns=4).splitlines()[1]
    assert line.split("|")[1] == "\u2581\u2588\u2584\u2582"
    assert line.endswith("| 0 to 8")
    shown.add(2.5, 4.0, {"a": 6.0})  # the middle of the last column is in both
    assert text_frame(shown, columns=4).splitlines()[1].split("|")[1] == "\u2581\u2588\u2586\u2586"


@pytest.mark.parametrize(
    ("value", "up"), [(0, 1), (-3, 1), (1, 1), (1.2, 2), (3, 5), (7, 10), (0.03, 0.05), (912, 1000)]
)
def test_axes_end_at_round_numbers(value: float, up: float) -> None:
    assert rounded_up(value) == pytest.approx(up)


def test_a_picture_shows_more_ink_where_more_happens() -> None:
    pytest.importorskip("PIL")
    from biscale_env.render.picture import COLOURS, HEIGHT, WIDTH, picture

    frame = picture(recent())
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert frame.dtype == np.uint8
    first = (frame == COLOURS[0]).all(axis=2).sum()
    assert first > 1000
    assert (picture(Recent("t", recent().strips)) == COLOURS[0]).all(axis=2).sum() < first / 4


def test_a_picture_draws_values_where_their_axes_say() -> None:
    """A high value is above a low one, nothing joins them over a gap, misses cross the strip."""
    pytest.importorskip("PIL")
    from biscale_env.render.picture import COLOURS, LEFT, MISS, RIGHT, TOP, WIDTH, picture

    def columns(frame, colour, x):
        rows = np.flatnonzero((frame[TOP + 26 :, x] == colour).all(axis=-1))
        return rows + TOP + 26

    shown = Recent("t", [Strip("a", "slack", -1.0, 1.0, bound=0.0)], span_s=4.0)
    for k, value in enumerate((0.9, np.nan, -0.9, -0.9)):
        shown.add(k, k + 1.0, {"a": value, "misses": k == 0})
    frame, wide = picture(shown), WIDTH - LEFT - RIGHT
    high, gap, low = (columns(frame, COLOURS[0], LEFT + wide * k // 8) for k in (1, 3, 5))
    assert high.max() < low.min()
    assert gap.size == 0
    for x in range(wide // 2 - 1, wide // 2 + 3):  # where the line begins anew
        assert columns(frame, COLOURS[0], LEFT + x).size <= 3, "nothing joins it to what was before"
    bound = columns(frame, MISS, LEFT + wide // 8)
    assert 1 <= bound.size <= 2
    assert high.max() < bound.min() <= bound.max() < low.min()
    missed = columns(frame, MISS, LEFT + wide // 4)
    assert missed.min() < high.min()
    assert missed.max() > low.max()
    assert (frame[:, :LEFT] == COLOURS[0]).all(axis=-1).sum() == 0


def test_a_terminal_is_cleared_and_a_log_is_not(monkeypatch, capsys) -> None:
    screen = Screen("human", "t", [Strip("a", "load")])
    screen.show()
    assert capsys.readouterr().out == text_frame(screen) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    screen.show()
    assert capsys.readouterr().out == CLEAR + text_frame(screen) + "\n"


@pytest.mark.parametrize("env_id", IDS)
def test_a_rendered_episode_is_the_same_as_one_that_is_not(env_id: str) -> None:
    plain, text = gym.make(env_id, **SMALL), gym.make(env_id, render_mode="ansi", **SMALL)
    for env in (plain, text):
        env.action_space.seed(1)
        env.reset(seed=0)
    assert plain.unwrapped._screen is None
    assert plain.unwrapped.render() is None
    frames = set()
    for _ in range(60):
        action = plain.action_space.sample()
        one, two = plain.step(action), text.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:] == two[1:]
        frames.add(text.render())
        if one[3]:
            break
    assert len(frames) > 15
    assert "SLO" in frames.pop()


@pytest.mark.parametrize("env_id", IDS[:2])
def test_what_is_shown_is_what_the_infos_say(env_id: str) -> None:
    env = gym.make(env_id, render_mode="ansi", **SMALL)
    env.reset(seed=0)
    infos = [env.step(env.action_space.sample())[4] for _ in range(15)]
    screen = env.unwrapped._screen
    env.render()
    shown = [step for step in screen.steps if step.begin_s >= infos[0]["time_s"] - 1e-9]
    last = infos[1:]
    energy_j = sum((step.end_s - step.begin_s) * step.values["power_w"] for step in shown)
    assert energy_j == pytest.approx(sum(info["energy_j"] for info in last))
    assert sum(step.end_s - step.begin_s for step in shown) == pytest.approx(
        sum(info["dt"] for info in last)
    )
    assert shown[-1].end_s == infos[-1]["time_s"]
    assert shown[-1].values["freq_mhz"] == pytest.approx(infos[-1]["freq_mhz"])
    assert screen.misses == sum(info["cost"] for info in infos)


@pytest.mark.parametrize("mode", RENDER_MODES)
def test_every_mode(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    env = gym.make(IDS[0], render_mode=mode, **SMALL)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    frame = env.render()
    shown = capsys.readouterr().out
    assert (type(frame), bool(shown)) == {
        "ansi": (str, False), "rgb_array": (np.ndarray, False), "human": (type(None), True),
    }[mode]  # fmt: skip
    assert "clock, MHz" in (shown or str(frame) if mode != "rgb_array" else "clock, MHz")
    copy.deepcopy(env).step(env.action_space.sample())


def test_the_vector_shows_each_environment() -> None:
    vector = gym.make_vec(IDS[0], num_envs=2, render_mode="ansi", **SMALL)
    single = gym.make(IDS[0], render_mode="ansi", **SMALL)
    vector.reset(seed=3)
    single.reset(seed=4)
    for _ in range(20):
        vector.step(np.full((2, 1), 0.3, dtype=np.float32))
        single.step(np.full(1, 0.3, dtype=np.float32))
    frames = vector.render()
    assert len(frames) == 2
    assert frames[1] == single.render()
    assert frames[0] != frames[1]
    assert gym.make_vec(IDS[0], num_envs=2, **SMALL).render() is None


def test_record_video_writes_a_film(tmp_path) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("PIL")
    env = gym.make(IDS[0], render_mode="rgb_array", **SMALL)
    film = gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda k: True)
    film.reset(seed=0)
    for _ in range(12):
        film.step(film.action_space.sample())
    film.close()
    assert [path.suffix for path in tmp_path.iterdir()].count(".mp4") == 1


def test_frames_of_record_video_without_a_codec() -> None:
    pytest.importorskip("PIL")
    env = gym.make(IDS[1], render_mode="rgb_array", **SMALL)
    kept = gym.wrappers.RenderCollection(env)
    kept.reset(seed=0)
    for _ in range(3):
        kept.step(kept.action_space.sample())
    frames = kept.render()
    assert len(frames) == 4
    assert all(frame.shape == frames[0].shape for frame in frames)


def test_without_pillow_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ValueError, match=r"install biscale-env\[render\]"):
        Screen("rgb_array", "t", [Strip("a", "load")]).frame()
