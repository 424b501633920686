"""What a run leaves beside its weights: means in CSV, cut where it resumes, events, and curves as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.log import RunLog, plot_curves, read_csv


def write(folder: Path, begin: int, end: int) -> None:
    with RunLog(folder, "stage", 100, begin) as log:
        for step in range(begin + 1, end + 1):
            log.step(step, step * 0.5, {"loss": float(step)})
            if step % 15 == 0:
                log.evaluation(step, step * 0.5, {"held_out": 1 / step})


def test_lines_hold_means_since_the_last_one(tmp_path: Path) -> None:
    write(tmp_path, 0, 34)
    log = read_csv(tmp_path / "train.csv")
    assert log == {"step": [10, 20, 30], "seconds": [5, 10, 15], "loss": [5.5, 15.5, 25.5]}
    assert read_csv(tmp_path / "held_out.csv")["held_out"] == pytest.approx([1 / 15, 1 / 30], rel=1e-5)


def test_what_came_after_the_checkpoint_is_written_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, 45)
    write(tmp_path, 20, 40)
    assert read_csv(tmp_path / "train.csv")["step"] == [10, 20, 30, 40]
    assert read_csv(tmp_path / "held_out.csv")["step"] == [15, 30]


def test_a_run_that_begins_anew_leaves_no_old_lines(tmp_path: Path) -> None:
    write(tmp_path, 0, 30)
    write(tmp_path, 0, 9)
    assert read_csv(tmp_path / "train.csv") == {}


def test_events_hold_the_same_figures(tmp_path: Path) -> None:
    write(tmp_path, 0, 30)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(10, 5.5), (20, 15.5), (30, 25.5)]
    assert [each.step for each in events.Scalars("held_out/held_out")] == [15, 30]


def test_curves_show_every_figure(tmp_path: Path) -> None:
    write(tmp_path, 0, 30)
    with Image.open(tmp_path / "curves.png") as picture:
        width = picture.width
    (tmp_path / "train.csv").write_text("step,seconds,loss,more,yet\n10,1,2,3,4\n20,2,1,2,3\n")
    plot_curves(tmp_path, "stage")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 2 * width  # four figures instead of two
        assert len(picture.convert("L").getcolors() or ()) > 10


def test_nothing_to_show_makes_no_picture(tmp_path: Path) -> None:
    plot_curves(tmp_path, "stage")
    assert list(tmp_path.iterdir()) == []


def test_a_silent_log_writes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, "stage", 100, 0, is_silent=True) as log:
        log.step(10, 1.0, {"loss": 1.0})
        log.evaluation(10, 1.0, {"held_out": 1.0})
    assert list(tmp_path.iterdir()) == []
