"""A study's page: a stranger reads what was asked, what came out and how sure it is."""

import dataclasses
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlhf_jax.config import Config
from rlhf_jax.study import Arm, Claim, Study, page
from rlhf_jax.study.results import Results, ResultsError, Row
from rlhf_jax.study.verdicts import estimates, judge
from rlhf_jax.study.words import answer, duration, surprises, table, within

INF = math.inf
NOISE = np.array([0.4, -1.3, 0.9, 0.2, -0.6, 1.1, -0.8, 0.1])  # its mean is 0
RECORD = {
    "command": ["rlhf-jax", "study", "experiments/credit.py", "--preset", "cpu", "--out", "runs/c"],
    "preset": "cpu",
    "settings": {"seeds": 8, "train": {"steps": 300}},
    "versions": {"jax": "0.10.2"},
    "revision": "3f6729d",
    "seconds": {"base": 75.2, "full": 133.0, "short": 0.4},
    "config": {"full": {"learning_rate": 0.002}},
}


class Page(HTMLParser):
    """What a reader sees, what is loaded, and whether every tag is closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.loaded, self.seen = [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.seen).split())

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.seen.append(data)


def figure(results):
    drawn = Figure(figsize=(2, 1))
    drawn.subplots().plot(results.values("reward", "full"), "o")
    return drawn


def difference(results):
    return results.values("reward", "full") - results.values("reward", "short")


def claim(name, supported, value=difference, possible=None, unit="nats"):
    return Claim(name, f"What {name} says.", value, supported, possible, unit)


def study(primaries=(), secondary=(), **changes):
    made = Study(
        name="credit",
        question="Does credit for later rewards pay?",
        arms={
            "full": Arm(Config("full", 300, {}, {}), "every later reward"),
            "short": Arm(lambda seed, before: {}, "the next token's"),
        },
        primaries=primaries,
        measure=lambda trained: {},
        figure=figure,
        caption="Reward of each seed.",
        secondary=secondary,
        bases={"base": Config("base", 3000, {}, {})},
        larger="On a pod the intervals shrink.",
    )
    return dataclasses.replace(made, **changes)


def results(mean=1.0, seeds=8, arms=("full", "short")):
    value = {"full": mean + 0.1 * NOISE, "short": 0.0 * NOISE}
    return Results(Row(arm, s, 300, "reward", value[arm][s]) for arm in arms for s in range(seeds))


ALL = (
    claim("P1", (0, INF)),
    claim("P2", (-0.5, 0.5)),
    claim("P3", (0.97, 1.03)),
    claim("P4", (-INF, 2), possible=(-INF, 3)),
)
SECOND = (claim("S1", (0, 2)), claim("S2", (5, 6)))


def test_the_page_says_what_was_asked_what_came_out_and_how_sure_it_is():
    source = page.page(study(ALL, SECOND), results(), RECORD)
    shown = Page(source)
    for said in (
        "Does credit for later rewards pay?",
        "2 of 4 claims are supported (P1, P4), 1 is refuted (P2) and 1 is undecided (P3).",
        "Reward of each seed.",
        "supported : What P1 says. (P1)",
        "P1 What P1 says. 1.00 d = ",
        "nats above 0 8 0.00781 0.0312 supported",
        "refuted if not below 3",
        "corrected by Holm for 4 claims",
        "P2 is refuted: “What P2 says”. Predicted: within ±0.5; found: 1.00 [",
        "P3 is undecided: “What P3 says”. Predicted: 0.97 to 1.03; found: 1.00 [",
        "S2, a secondary claim: “What S2 says”. Predicted: 5 to 6; found: 1.00 [",
        "base a base: trained once, shared by arms 3,000 75 s",
        "full every later reward 300 2.2 min",
        "short the next token's computed 0.4 s",
        "On a pod the intervals shrink. rlhf-jax study experiments/credit.py --preset gpu1",
        "revision 3f6729d preset cpu time of arms and bases 3.5 min jax 0.10.2",
        '"learning_rate": 0.002',
    ):
        assert said in shown.text, said
    assert [url.partition(",")[0] for url in shown.loaded] == ["data:image/png;base64"]
    assert "http" not in source and "url(" not in source


def test_texts_are_escaped():
    wild = Claim("P<1>", "a < b & <script>", difference, (0, INF), unit="<i>")
    made = study((wild,), name="<b>", question="<q>?", caption='"<c>"', larger="<l>")
    source = page.page(made, results(), {**RECORD, "versions": {"<v>": "<w>"}})
    shown = Page(source)
    assert 'alt="&quot;&lt;c&gt;&quot;"' in source
    for said in ("P<1>", "a < b & <script>", "<i>", "<b>", "<q>?", '"<c>"', "<l>", "<v> <w>"):
        assert said in shown.text


def test_a_record_may_be_empty():
    shown = Page(page.page(study(ALL, larger=""), results(), {}))
    assert "How to run it larger" not in shown.text and "the next token's computed –" in shown.text


def test_a_part_of_a_study_has_a_page_too():
    other = claim("P5", (0, 2), lambda r: r.values("reward", "full"))
    shown = Page(page.page(study((*ALL, other)), results(arms=("short",)), RECORD))
    assert "All 5 claims were not run." in shown.text
    assert "arm 'full' was not run; there is short" in shown.text
    assert "The figure needs an arm that was not run." in shown.text
    assert "No claim has been put to the test." in shown.text
    assert "full every later reward 300 not run" in shown.text
    shown = Page(page.page(study((*ALL, other)), results(arms=("full",)), RECORD))
    assert "1 of 5 claims is supported (P5) and 4 were not run (P1, P2, P3, P4)." in shown.text
    assert "Claims that were not run count in that number, too." in shown.text


def test_what_is_saved_is_the_page_and_its_figure(tmp_path):
    made, record = study(ALL), {**RECORD, "settings": "Settings(…)"}
    path = page.save(made, results(), record, tmp_path / "new" / "out")
    assert path.read_text(encoding="utf-8") == page.page(made, results(), record)
    assert (path.parent / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in path.parent.iterdir()) == ["figure.png", "index.html"]
    with pytest.raises(ResultsError, match=r"cannot write .*index\.html"):
        page.save(made, results(), record, path)


def told(primaries, secondary=(), **made):
    found = results(**made)
    return surprises(judge(primaries, found), estimates(secondary, found))


@pytest.mark.parametrize(
    "claims, seeds, sentence",
    [
        (ALL[:1], 8, "The one claim is supported."),
        (ALL[::3], 8, "Both claims are supported."),
        (ALL[:2], 8, "1 of 2 claims is supported (P1) and 1 is refuted (P2)."),
        (
            ALL[:2],
            1,
            "Both claims are undecided. 1 seed cannot decide 2 claims; 1 of 2 estimates lies "
            "where it was predicted.",
        ),
    ],
)
def test_the_answer_in_a_sentence(claims, seeds, sentence):
    assert answer(judge(claims, results(seeds=seeds))) == sentence


def test_nothing_is_surprising_where_every_estimate_lies_as_predicted():
    assert told(ALL[::3], SECOND[:1]) == []
    shown = Page(page.page(study(ALL[::3], SECOND[:1]), results(), {}))
    assert "Nothing: every estimate lies where it was predicted." in shown.text
    near = claim("S3", (1.0001, 1.1))  # the interval straddles a bound
    shown = Page(page.page(study(ALL[::3], (near,)), results(), {}))
    assert "Nothing: no result contradicts its prediction." in shown.text


def test_one_seed_surprises_where_its_estimate_lies_elsewhere():
    assert told(ALL, SECOND, seeds=1) == [
        "P2: “What P2 says”. Predicted: within ±0.5; found: 1.04 nats, though 1 seed cannot decide "
        "4 claims.",
        "P3: “What P3 says”. Predicted: 0.97 to 1.03; found: 1.04 nats, though 1 seed cannot "
        "decide 4 claims.",
        "S2, a secondary claim: “What S2 says”. Predicted: 5 to 6; found: 1.04 nats.",
    ]
    shown = Page(page.page(study(ALL), results(seeds=1), {}))
    assert "undecided the estimate lies where predicted" in shown.text
    assert "undecided the estimate lies elsewhere than predicted" in shown.text


def test_a_secondary_claim_that_is_not_finite_is_named():
    ratio = claim("S1", (0, 2), lambda r: np.where(NOISE > 1, np.nan, NOISE))
    expected = "Predicted: 0 to 2; found: not finite for seeds 5."
    assert told((), (ratio,))[0].endswith(expected)


def test_the_table_in_markdown_has_a_cell_for_every_column():
    odd = Claim("P5", "KL(π|π₀)\nis small", difference, (-INF, 2))
    lines = table(judge((*ALL, odd), results())).splitlines()
    assert len(lines) == 7 and "verdict" in lines[0]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {10}
    assert r"KL(π\|π₀) is small" in lines[-1]
    assert "refuted if not below 3" in lines[5] and lines[2].endswith("| 0.0391 | supported |")
    few = table(judge(ALL, results(seeds=2))).splitlines()
    assert few[2].endswith("| undecided (the estimate lies where predicted) |")


def test_bounds_and_times_in_words():
    bounds = [(0, INF), (-INF, -0.5), (-0.02, 0.02), (0.8, 1.2), (-INF, INF)]
    words = ["above 0", "below −0.5", "within ±0.02", "0.8 to 1.2", "a number"]
    assert [within(*b) for b in bounds] == words
    assert [duration(s) for s in (0.41, 9, 75.2, 133)] == ["0.4 s", "9.0 s", "75 s", "2.2 min"]


def test_a_study_without_claims_still_has_a_page():
    shown = Page(page.page(study(), results(), RECORD))
    assert "Nothing was claimed beforehand." in shown.text and "Holm" not in shown.text
