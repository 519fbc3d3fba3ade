"""The report: one page that needs nothing else, and says what the run wrote, the bad included."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from rlhf_jax import figures
from rlhf_jax.page import number, text
from rlhf_jax.report import ReportError, report, summary

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, their attributes, what a reader sees, and whether every tag is closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.attributes, self.seen = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.seen.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.seen).split())


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def picture(request, monkeypatch):
    """Tests of the page need no picture: drawing it takes most of the time."""
    if "picture" not in request.function.__name__:
        monkeypatch.setattr(figures, "png", lambda *_, **__: b"")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ppo_row(step):
    return {
        "step": step,
        "wall": 1000.0 + step,
        "rollout/reward": step / 10,
        "rollout/return": step / 10 - 0.5,
        "rollout/kl": 0.1 * step,
        "rollout/entropy": 3.0,
        "rollout/length": 15.5,
        "policy/loss": -0.01,
        "policy/grad_norm": 1.0 + step,
        "policy/skipped": 0.0,
        "time/rollout": 9.0 if step == 0 else 0.5,
        "speed/rollout": 10.0 if step == 0 else 2000.0,
    }


def make_run(directory, steps=60):
    write_lines(directory / "metrics.jsonl", [ppo_row(step) for step in range(steps)])
    samples = [
        {"step": step, "prompt": f"prompt {i}", "response": f"said {step} {i}", "reward": i * step}
        for step in (0, 30, 60)
        for i in (1, -1, 0)
    ]
    write_lines(directory / "samples.jsonl", samples)
    record = {
        "file": "experiments/ppo.py",
        "settings": ["steps=60"],
        "command": ["rlhf-jax", "train", "experiments/ppo.py", "--out", "runs/a b"],
        "config": {"type": "Config", "name": "my ppo", "steps": 60, "seed": 7},
        "versions": {"jax": "0.10.2", "devices": "8 × TPU v5e (tpu)"},
    }
    (directory / "run.json").write_text(json.dumps(record))
    return directory


def test_a_page_needs_nothing_but_itself(tmp_path):
    path = report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = read(path)
    assert page.open == []
    assert not any(tag in ("script", "link", "iframe") for tag, *_ in page.attributes)
    for _, name, value in page.attributes:
        assert name not in ("src", "srcset")
        assert name != "href" or value.startswith("#")
    assert "url(" not in path.read_text()


def test_a_picture_of_the_main_curves_lies_beside_the_page(tmp_path):
    make_run(tmp_path)
    rows = [ppo_row(step) for step in range(60)]
    rows[3]["a$b$/loss"] = 1.0  # not a formula
    write_lines(tmp_path / "metrics.jsonl", rows)
    report(tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_shows_what_happened_and_how_it_was_made(tmp_path):
    page = read(report(make_run(tmp_path))).text
    assert "60 steps. From the first steps to the last: reward 0.200 → 5.70" in page
    assert "KL(policy‖reference) 0.200 → 5.70" in page
    for part in (
        "my ppo", "Reward", "Entropy", "nats per token", "Length of responses", "Loss of policy",
        "Throughput by phase", "tokens per second", "grad_norm", "8 × TPU v5e (tpu)", "0.10.2",
        "rlhf-jax train experiments/ppo.py --out 'runs/a b'", "steps=60", '"seed": 7',
    ):  # fmt: skip
        assert part in page, part


def test_the_samples_are_before_and_after_good_and_bad(tmp_path):
    page = read(report(make_run(tmp_path))).text
    assert "at step 0 reward at step 60" in page
    assert "said 30" not in page
    best, same, worst = (page.index(f"prompt {i} said 0 {i}") for i in (1, 0, -1))
    assert best < same < worst
    assert "prompt 1 said 0 1 0 said 60 1 60 +60" in page
    assert "said 60 -1 −60 −60" in page


def test_the_first_step_compiles_and_is_in_no_speed(tmp_path):
    page = read(report(make_run(tmp_path))).text
    assert "rollout 9.00 0.500 2,000 100%" in page
    assert figures.points([ppo_row(0), ppo_row(1)], "speed/rollout") == [(2, 2000.0)]
    assert figures.points([ppo_row(0)], "speed/rollout") == [(1, 10.0)]
    assert figures.points([ppo_row(0), ppo_row(1)], "rollout/kl") == [(1, 0.0), (2, 0.1)]


def test_what_was_not_finite_or_skipped_is_said(tmp_path):
    make_run(tmp_path)
    rows = [ppo_row(step) for step in range(60)]
    rows[5]["policy/loss"] = rows[6]["policy/loss"] = None
    rows[-1]["policy/skipped"] = 2.0
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = read(report(tmp_path)).text
    assert "policy/loss was not finite in 2 of 60 steps" in page
    assert "policy skipped 2.00 updates" in page


def test_a_run_that_was_killed_is_reported_up_to_its_last_line(tmp_path):
    make_run(tmp_path, steps=12)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "rollo')
    assert "12 of 60 steps." in read(report(tmp_path)).text


@pytest.mark.parametrize("row", [{"x": None}, {}, {"policy/loss": None, "speed/a": None}])
def test_a_run_without_one_number_is_still_a_page(tmp_path, row):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, **row}])
    assert "1 step." in read(report(tmp_path)).text


def test_a_pipeline_has_a_section_for_every_stage_in_its_order(tmp_path):
    make_run(tmp_path / "a_ppo")
    write_lines(tmp_path / "b_reward" / "metrics.jsonl", [{"step": 0, "reward/accuracy": 0.75}])
    (tmp_path / "b_reward" / "eval.json").write_text('{"heldout/accuracy": 0.695}')
    (tmp_path / "verdict").mkdir()
    stages = {"b_reward": {"steps": 1}, "a_ppo": {"steps": 60}, "verdict": {}}
    record = {"config": {"name": "both", "stages": stages}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = {
        "title": "Verdict",
        "text": "The gain is clear.",
        "rows": [
            {"name": "gain", "value": 0.816, "low": 0.723, "high": 0.909, "unit": "rating",
             "note": "paired"},
            {"name": "ratio", "value": 0.85},
        ],
        "samples": [{"before": "dull", "after": "", "gain": -0.5}],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(result))
    path = report(tmp_path)
    page = read(path).text
    sections = [
        value for tag, name, value in read(path).attributes if (tag, name) == ("section", "id")
    ]
    assert sections == ["b_reward", "a_ppo", "made"]
    assert page.index("The gain is clear.") < page.index("gain paired 0.816 [0.723, 0.909] rating")
    assert "dull (nothing) −0.500" in page
    assert "heldout/accuracy 0.695" in page
    assert "Configuration of a_ppo" in page


def test_every_drawing_is_well_formed_and_inside_its_box():
    rows = [
        {"step": i, "speed/a": 10.0**i, "speed/b": 0.0, "a/loss": 1e-9 * i, "b/loss": 3.0}
        for i in range(7)
    ]
    rows.append({"step": 7, "a/loss": -1e30})
    every = figures.main_panels(rows) + [p for g in figures.other_panels(rows).values() for p in g]
    assert {m for panel in every for m in panel.metrics} == set(rows[0]) - {"step"}
    for panel in every:
        figure = ET.fromstring(figures.svg(panel, rows))
        for path in figure.iter("path"):
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d")):
                assert 0 <= float(x) <= figures.WIDTH
                assert 0 <= float(y) <= figures.HEIGHT


def test_long_runs_are_drawn_by_their_means():
    found = figures.thinned([(i + 1, float(i % 2)) for i in range(100_000)])
    assert len(found) == figures.POINTS
    assert found[-1][0] == 100_000
    assert {y for _, y in found} == {0.5}
    assert figures.running_mean((0.0, 3.0, 6.0), 1) == [1.5, 3.0, 4.5]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-3.2, 7), (1, 8), (1e-7, 3e-7), (1, 100_000), (5, 5), (5.5688, 5.5702), (-1e30, 0)],
)
def test_ticks_are_few_round_and_inside(low, high):
    found = figures.ticks(low, high, 4)
    assert 1 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
    assert len(set(figures.tick_labels(found))) == len(found)
    for tick in found:
        if tick and high > low:
            digits = f"{abs(tick):.6e}".split("e")[0].rstrip("0").replace(".", "")
            assert len(digits) <= (3 if low != 5.5688 else 5)


def test_labels_of_an_axis_are_short_and_differ():
    assert figures.tick_labels([5.569, 5.5695, 5.57]) == ["5.569", "5.5695", "5.57"]
    assert figures.tick_labels([0.0, 0.25, 0.5]) == ["0", "0.25", "0.5"]
    assert figures.tick_labels([-2e-7, 5000, 20_000, 2e6]) == ["−2e−07", "5,000", "20k", "2M"]


def test_numbers_are_short_and_texts_are_escaped():
    shown = [number(x) for x in (0.81606, 16.0, -2.4, 12345.6, 7, None, math.nan, 3e-9, 0.0)]
    assert shown == ["0.816", "16.0", "−2.40", "12,346", "7", "–", "–", "3.00e−09", "0.00"]
    assert text("<b>\x04&\n") == "&lt;b&gt;␄&amp;\n"


def test_names_and_samples_are_text_and_never_html(tmp_path):
    bad = "<script>alert(1)</script>"
    rows = [{"step": 0, f"{bad}/loss": 1.0, f"speed/{bad}": 2.0, f"time/{bad}": 1.0, "$x$": 0.5}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(tmp_path / "samples.jsonl", [{"step": 0, "prompt": bad, "response": bad}])
    (tmp_path / "run.json").write_text(json.dumps({"config": {"name": bad}, "command": [bad]}))
    path = report(tmp_path)
    assert "<script" not in path.read_text()
    assert bad in read(path).text


def test_a_directory_without_a_run_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(ReportError, match=r"there is no directory .*gone; give the --out"):
        report(tmp_path / "gone")
    with pytest.raises(ReportError, match="holds no metrics yet"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="holds no metrics yet"):
        report(tmp_path)
    make_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReportError, match=r"results.json is not valid JSON .*mend it"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ReportError, match="must hold a JSON object"):
        report(tmp_path)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    make_run(tmp_path)
    (tmp_path / "report.png").mkdir()
    with pytest.raises(ReportError, match="cannot write"):
        report(tmp_path)


def test_the_summary_compares_held_out_accuracy_too():
    from rlhf_jax.report import Stage

    rows = [
        {"step": i, "reward/accuracy": 0.5 + i / 10, "eval/pairs/accuracy": 0.6} for i in range(2)
    ]
    said = summary(Stage("reward", rows, [], {}, {}))
    assert "accuracy of reward 0.500 → 0.600, accuracy of eval/pairs 0.600 → 0.600" in said
