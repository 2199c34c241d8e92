"""The page and the table, from a report made by hand."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.judge import metrics, tasks
from pipeline.judge.pictures import pictures
from pipeline.judge.sounds import sounds
from pipeline.report import plots, senses, verification

VOID = {"meta", "br", "img"}


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def summary(kld: float, top1: float) -> dict[str, Any]:
    return {
        "positions": 2048,
        "blocks": 128,
        "kld": estimate(kld),
        "kld_median": estimate(kld / 2),
        "kld_p99": estimate(kld * 9),
        "kld_p999": estimate(kld * 14),
        "kld_max": estimate(kld * 20),
        "top1": {"value": top1, "low": top1 - 0.001, "high": top1},
        "top5": estimate(1.0),
        "rms_delta_p": estimate(0.012),
        "ties": 0.0,
        "margin": 0.02,
        "perplexity": 41.2,
        "reference_perplexity": 41.0,
        "perplexity_ratio": estimate(1.005),
        "nmse_mean": kld,
        "nmse_max": kld * 3,
        "max_abs": 0.4,
    }


def variant(name: str, kld: float, *, alternative: bool = False, fit: bool = True) -> dict[str, Any]:
    size = {"fp32": 9_400_000, "fp16": 4_750_000}.get(name, 2_450_000)
    gate = {"int8": "int8-dynamic"}.get(name, name)
    counts = [0] * (len(metrics.kld_edges()) - 1)
    counts[20], counts[21] = 900, 1148
    return {
        "file": f"{name}/step.tflite",
        "sha256": "ab" * 32,
        "size": size,
        "size_ratio": size / 9_400_000,
        "size_per_parameter": size / 2_345_678,
        "gate": gate,
        "limits": {"kld": 0.01},
        "alternative": alternative,
        "fit": fit,
        "against_reference": summary(kld, 0.985),
        "against_fp32": None if name == "fp32" else summary(kld, 0.985),
        "divergence": divergence(),
        "grid": {},
        "integer_share": 0.97 if name.startswith("int8") else None,
        "float_operators": {"SOFTMAX <1>": 8, "RSQRT": 90} if name.startswith("int8") else None,
        "float_products": {"attn;11": 0.0548} if name == "int8" else None,
        "kld_histogram": counts,
    }


def check(name: str, value: float | None, limit: float | None, passed: bool) -> dict[str, Any]:
    return {
        "variant": name,
        "name": "KLD on text",
        "value": value,
        "limit": limit,
        "low": None,
        "high": None,
        "direction": "<=",
        "status": "pass" if passed else "not measured" if value is None else "fail",
        "passed": passed,
        "against": "fp32",
        "detail": "2048 positions",
    }


def divergence() -> dict[str, Any]:
    return {"texts": 16, "tokens": 128, "length": estimate(77.7), "identical": estimate(0.4)}


def by_script(kld: float) -> dict[str, Any]:
    def of(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value}

    latin = {"positions": 300, "kld": of(kld), "top1": of(0.97), "kld_ratio": None}
    return {"Latin": latin, "Tifinagh": {**latin, "positions": 77, "kld": of(3 * kld), "kld_ratio": of(3.125)}}


def bundle(name: str, kld: float, *, fit: bool = True) -> dict[str, Any]:
    said = [
        {"prompt": "<i>x</i>", "expected": "a & b", "text": "a & b", "tokens": 9, "agree": 9, "same": True},
        {"prompt": "الحق", "expected": "في", "text": "لكل", "tokens": 9, "agree": 2, "same": False},
    ]
    return {
        "file": f"bundle/{name}.litertlm",
        "sha256": "ef" * 32,
        "size": 10_700_000,
        "size_per_parameter": 4.6,
        "bytes_per_weight": 4.0 if name == "fp32" else 1.03,
        "scripts": {} if name == "fp32" else by_script(kld),
        "fit": fit,
        "phone": {
            "cache": 300_000,
            "tokens": 3969,
            "sections": [1_900_000_000, 537_000_000],
            "activation_type": "fp32" if name == "fp32" else "",
        },
        "positions": 411,
        "against_reference": summary(kld, 1.0),
        "against_cached": summary(kld, 1.0) if name == "fp32" else None,
        "divergence": divergence(),
        "token_ids": {"total": 1350, "wrong": 0, "examples": []},
        "prompts": {"total": 8, "wrong": 0 if fit else 1, "examples": [] if fit else ["'<u>'"]},
        "greedy": {"same": 1, "ties": 1, "rows": [{**row, "tie": not row["same"]} for row in said]},
        "stop": {"total": 2, "wrong": 0, "examples": []},
        "stopped_at": [6],
        "scored": 4,
        "score_error": 2.5e-5,
    }


def without_bundles() -> dict[str, Any]:
    return {**made_by_hand(), "bundles": {}}


def without_step_graphs() -> dict[str, Any]:
    """As GRAPHS=bundle gives it: nothing of the step graphs but their checks' places."""
    whole = made_by_hand()
    for name in ("continuation", "greedy", "positions"):
        del whole[name]
    checks = [check("bundle-fp32", 1e-11, 1e-6, True)]
    return {**whole, "order": [], "variants": {}, "speed": {}, "checks": checks, "alternative_checks": []}


def that_sees() -> dict[str, Any]:
    """A bundle's towers: every picture and sound that is judged, and one more that is not any more."""
    whole = made_by_hand()
    names = {"vision": [*pictures()], "audio": [*sounds()]}
    said = {"question": "<u>What?</u>", "expected": "a & b", "text": "a & c", "same": False, "tie": True}
    both = [["image", "face"], ["image", "noise"], ["audio", "chord"]]
    for precision, error in (("fp32", 1e-12), ("int8", 1e-3)):
        errors = {f"{tower}-{precision}": {name: error for name in own} for tower, own in names.items()}
        answers = [{"tower": "vision", "media": both, **said}] * 40 if precision == "fp32" else []
        whole["bundles"][f"bundle-{precision}"]["senses"] = {
            "errors": errors,
            "said": answers,
            "resized": 1e-4 if answers else None,
        }
    whole["bundles"]["bundle-fp32"]["senses"]["errors"]["vision-fp32"]["gone"] = None
    return whole


def made_by_hand() -> dict[str, Any]:
    order = ["fp32", "fp16", "int8", "int8-static"]
    files = {
        name: {"ids": [5, 6, 7], "text": "heaven and the earth", "agree": 3, "same": name != "int8-static"}
        for name in order
    }
    timing = {"load": 0.0012, "latency": {"1": 0.0011, "128": 0.0123, "1024": 0.4}}
    short = {"load": 0.0012, "latency": {"1": 0.0012, "128": 0.0456}}  # the built-in kernels take seconds at 1,024
    return {
        "schema": 2,
        "model": "tiny <b>model</b>",
        "revision": "0123abcd",
        "recipe": "gemma3n",
        "recipe_sha256": "cd" * 32,
        "tools": {"python": "3.11.7", "torch": "2.13.0", "litert-lm-api": "0.18.1"},
        "parameters": 2_345_678,
        "passed": True,
        "checks": [check("fp32", 1e-11, 1e-6, True), check("int8", 0.002, 0.01, True)],
        "alternative_checks": [check("int8-static", 0.2, 0.05, False)],
        "reference": {
            "dtype": "float32",
            "attention": "eager",
            "device": "cpu",
            "documents": 140,
            "windows": 119,
            "window": 128,
            "shape_cases": 84,
            "self_floor": {
                "threads": {"against": "1 instead of 2 threads", **summary(1e-13, 1.0)},
                "bfloat16": {"against": "bfloat16 instead of float32", **summary(7.7e-5, 0.99)},
            },
            "sliding_window": 16,
            "conversation": 297,
            "texts": 2,
        },
        "bundles": {"bundle-fp32": bundle("fp32", 1e-12), "bundle-int8": bundle("int8", 3e-3)},
        "continuation": 24,
        "positions": 2048,
        "order": order,
        "fixed": ["1x128"],
        "variants": {
            "fp32": variant("fp32", 1e-11),
            "fp16": variant("fp16", 1e-7),
            "int8": variant("int8", 2e-3),
            "int8-static": variant("int8-static", 0.2, alternative=True, fit=False),
        },
        "greedy": [
            {"prompt": "<script>alert(1)</script>", "reference": "a & b", "tokens": 24, "files": files},
            {"prompt": "لكل شخص", "reference": "الحق في", "tokens": 24, "files": files},
        ],
        "speed": {name: {"xnnpack": timing, "builtin": short} for name in order},
        "sequences": [1, 128, 1024],
        "machine": {"system": "Linux", "processor": "A processor", "cores": 2, "threads": 2},
        "date": "2026-11-24",
    }


class Outline(HTMLParser):
    """Checks that elements nest, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert not parser.open
    return parser


def test_the_page_is_one_well_formed_file_that_loads_nothing() -> None:
    page = verification.render(made_by_hand())
    found = outline(page)
    assert not found.links and "script" not in found.seen
    assert "@import" not in page and "url(" not in page
    assert found.seen.count("svg") == 2


def test_what_bundles_see_and_hear_is_shown_and_nothing_is_loaded() -> None:
    page = verification.render(that_sees())
    found = outline(page)
    assert page == verification.render(that_sees()), "the same bytes every time"
    assert found.links and all(link.startswith("data:image/jpeg;base64,") for link in found.links)
    assert max(map(len, found.links)) < 6_000
    assert len(page) < 400_000
    assert "script" not in found.seen and "url(" not in page
    drawn, heard = len(pictures()), len(sounds())
    answers = senses._MOST
    assert len(found.links) == drawn + 2 * answers
    assert page.count('alt="photograph, upright by its word"') == 1
    assert page.count('<svg class="look"') == heard + answers
    assert 'aria-label="speech, 7.77 s, 7.77 s"' in page
    assert "soft tokens of the photograph then have an error of 1.0 × 10⁻⁴ (40.0 dB)" in page
    assert "Pictures (27)" in page and "120.0 dB" in page and "30.0 dB" in page
    assert "&lt;u&gt;What?&lt;/u&gt;" in page and "a &amp; c" in page and "parts, at a tie" in page
    assert "(0 of 32 identical)" in page


def test_a_report_without_towers_speaks_of_none() -> None:
    page = verification.render(made_by_hand())
    assert "see and hear" not in page and "look" not in page and "data:" not in page


def test_text_is_escaped() -> None:
    page = verification.render(made_by_hand())
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "tiny &lt;b&gt;model" in page and "a &amp; b" in page and "SOFTMAX &lt;1&gt;" in page


def test_text_of_either_direction_is_laid_out_by_its_own_script() -> None:
    assert '<td dir="auto">الحق في</td>' in verification.render(made_by_hand())


def test_a_pass_says_so_and_marks_the_alternative() -> None:
    page = verification.render(made_by_hand())
    assert "Verified:" in page and "Verification failed" not in page
    assert page.count("not fit to publish") == 2
    assert "All 2 required checks passed" in page


def test_a_failure_says_which_check_with_value_and_limit() -> None:
    failed = made_by_hand()
    failed["passed"] = False
    failed["checks"][1] = check("int8", 0.0213, 0.01, False)
    failed["variants"]["int8"]["fit"] = False
    page = verification.render(failed)
    assert "Verified:" not in page and "1 of 2 required checks did not pass" in page
    assert "int8: KLD on text is 0.0213, the limit is ≤ 0.01" in page


def test_a_check_that_could_not_be_made_is_shown_as_failed() -> None:
    failed = made_by_hand()
    failed["passed"] = False
    failed["checks"].append(check("fp16", None, None, False))
    says = "fp16: KLD on text is not known, the limit is missing: not measured, which is no pass"
    assert says in verification.render(failed)


def test_a_check_that_is_open_says_that_more_positions_would_tell() -> None:
    failed = made_by_hand()
    failed["passed"] = False
    undecided = {"status": "inconclusive", "low": 0.009, "high": 0.011}
    failed["checks"].append(check("int8", 0.0095, 0.01, False) | undecided)
    page = verification.render(failed)
    assert "inconclusive, the 95 % interval 0.009 – 0.011 rests on too few positions; judge more" in page
    assert '<span class="badge open">inconclusive</span>' in page


def test_what_was_not_tried_is_said_to_be_so() -> None:
    report = made_by_hand()
    untried = {**check("scores", 0.0, 0.0, False), "status": "inconclusive", "low": None, "high": None}
    report |= {"passed": False, "checks": [untried]}
    next(iter(report["bundles"].values()))["prompts"] = None
    page = verification.render(report)
    assert "inconclusive, there was no case to try" in page and "no template" in page
    assert any(" – " in line for line in verification.table({**report, "variants": {}}))


def test_the_reference_stands_beside_itself() -> None:
    page = verification.render(made_by_hand())
    assert "bfloat16 instead of float32" in page and "7.7 × 10⁻⁵" in page
    streamed = made_by_hand()
    streamed["reference"]["self_floor"]["bfloat16"] = {"not_measured": "not measured: it is streamed"}
    page = verification.render(streamed)
    assert "not measured: it is streamed" in page and "7.7 × 10⁻⁵" not in page


def test_figures_that_are_missing_leave_a_page_and_a_table() -> None:
    holes = made_by_hand()
    for name in ("int8", "int8-static"):
        holes["variants"][name]["against_reference"] = _emptied(holes["variants"][name]["against_reference"])
        holes["variants"][name]["against_fp32"] = _emptied(holes["variants"][name]["against_fp32"])
    outline(verification.render(holes))
    assert len(verification.table(holes)) == 5 + 3


def _emptied(value: Any) -> Any:
    return {key: _emptied(item) for key, item in value.items()} if isinstance(value, dict) else None


@pytest.mark.parametrize(("part", "rows"), [(without_bundles, 5), (without_step_graphs, 3)])
def test_either_kind_of_file_makes_a_page_alone(part: Callable[[], dict[str, Any]], rows: int) -> None:
    page = verification.render(part())
    outline(page)
    assert "Verified:" in page and len(verification.table(part())) == rows
    assert ("The bundles in LiteRT-LM" in page) == (part is without_step_graphs)
    assert ("The step graphs compared" in page) == (part is without_bundles)


def test_what_each_bundle_asks_of_a_phone_is_told() -> None:
    page = verification.render(made_by_hand())
    table = page.partition("What a phone needs")[2].partition("</table>")[0]
    assert table.count("11.0 MB") == 2 and table.count("1.9 GB, 537.0 MB") == 2 and table.count("3969") == 2
    assert ">fp32</td>" in table and "else float16" in table and "on no GPU" in table


def test_a_bundles_texts_stand_beside_the_originals() -> None:
    page = verification.render(made_by_hand())
    assert "&lt;i&gt;x" in page and '<td dir="auto">لكل</td>' in page
    assert "parts after 2 of 9, at a tie" in page


def test_what_a_script_loses_stands_beside_what_latin_does() -> None:
    page = verification.render(made_by_hand())
    assert "bundle-int8: by script" in page and "bundle-fp32: by script" not in page
    row = page[page.index("Tifinagh") :]
    assert "77" in row[:200] and "3.125" in row[:600]


def test_a_bundle_that_failed_is_marked() -> None:
    failed = made_by_hand()
    failed["bundles"]["bundle-int8"] = bundle("int8", 3e-3, fit=False)
    page = verification.render(failed)
    assert "7 of 8" in page
    assert verification.table(failed)[-1].endswith("FAILED")


def test_the_same_report_gives_the_same_page_also_after_json() -> None:
    one = made_by_hand()
    assert verification.render(one) == verification.render(json.loads(json.dumps(one, sort_keys=True)))


def test_a_changed_figure_changes_the_page() -> None:
    other = copy.deepcopy(made_by_hand())
    other["variants"]["int8"]["against_fp32"]["kld"]["value"] = 0.004321
    assert "0.004321" in verification.render(other) and "0.004321" not in verification.render(made_by_hand())


def test_the_table_has_a_row_per_file_in_the_order_of_judging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(made_by_hand(), sort_keys=True), encoding="utf-8")
    assert verification.main([str(file)]) == 0
    rows = capsys.readouterr().err.splitlines()
    names = ["file", "fp32", "fp16", "int8", "int8-static", "bundle", "bundle-fp32", "bundle-int8"]
    assert [row.split()[0] for row in rows] == names
    assert re.search(r"1\.20 +1\.10 +12\.3 +400 ", rows[1])
    assert rows[4].endswith("not fit to publish") and rows[3].endswith("passed")


@pytest.mark.parametrize(("static", "said"), [(0.2, 1), (2.1e-3, 0)])
def test_a_static_file_that_is_clearly_worse_is_advised_against(static: float, said: int) -> None:
    whole = made_by_hand()
    for name, gate, kld in (("int8", "int8-dynamic", 2e-3), ("int8-static", "int8-static", static)):
        whole["variants"][name] |= {"gate": gate, "against_fp32": summary(kld, 0.98)}
    found = verification.advice(whole)
    assert len(found) == said == verification.render(whole).count("wrong choice for this model")
    assert all(sentence.startswith("int8-static is") for sentence in found)


def test_nothing_is_advised_of_figures_that_are_missing() -> None:
    whole = made_by_hand()
    whole["variants"]["int8"] |= {"gate": "int8-dynamic"}
    whole["variants"]["int8-static"] |= {"gate": "int8-static"}
    whole["variants"]["int8-static"]["against_fp32"]["kld"] = {"value": None, "low": None, "high": None}
    assert verification.advice(whole) == []


def test_the_table_needs_a_report() -> None:
    assert verification.main([]) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.2345678, "1.235"),
        (1.26e-11, "1.3 × 10⁻¹¹"),
        (0.0101, "0.0101"),
        (2_400_000.0, "2.4 × 10⁶"),
    ],
)
def test_figures_for_people(value: float | None, text: str) -> None:
    assert verification.figure(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.0012, "+0.12\u00a0%"), (0.5, "-50.00\u00a0%"), (0.999999, "+0.00\u00a0%"), (None, "unknown")]
)
def test_a_change_of_perplexity_has_a_sign(ratio: float | None, text: str) -> None:
    assert verification.change(ratio) == text


def test_where_a_file_loses_quality_is_a_table_and_a_plot() -> None:
    """Below 0 and above 80 dB the curve runs along the edge."""
    worst = {"name": "layers.1.mlp.down_proj;", "code": "FULLY_CONNECTED", "layer": "layers.1", "decibels": 3.21}
    curve = [
        ("before the layers", 200.0),
        ("layers.0", 44.0),
        ("layers.0", 43.0),
        ("layers.1", 3.2),
        ("layers.1", -9.0),
    ]
    loss = {"tokens": 512, "says": "the first to leave is <it>", "curve": curve}
    loss["layers"] = [{"layer": "layers.1", "decibels": 3.3, "worst": worst}]
    page = verification.render({**made_by_hand(), "losses": {"int8": loss}})
    outline(page)
    assert "Where int8 loses quality" in page and "the first to leave is &lt;it&gt;" in page
    plot = ElementTree.fromstring(plots.signal_to_noise("int8", curve))
    line = next(each for each in plot.iter() if each.tag.endswith("polyline")).attrib["points"]
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights == sorted(heights) and heights[0] == 20 and heights[-1] == 244
    assert "loses quality" not in verification.render({**made_by_hand(), "losses": {}})


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00\u00a0%"), (0.99999, "99.99\u00a0%"), (0.98345, "98.34\u00a0%"), (None, "–")]
)
def test_nothing_less_than_all_is_shown_as_all(share: float | None, text: str) -> None:
    assert verification.percent(share) == text


def test_plots_are_well_formed_and_stay_inside_their_frame() -> None:
    counts = [3] * (len(metrics.kld_edges()) - 1)
    rows = [
        plots.Distribution(name=f"a<{i}", against="b&c", counts=counts, mean=mean, limit=limit)
        for i, (mean, limit) in enumerate([(0.0, 1e-6), (1e-3, 1e-2), (99.0, None)])
    ]
    points = [
        plots.Point(name=f"p{i}", size=size, kld=kld, low=kld / 2, high=kld * 2)
        for i, (size, kld) in enumerate([(9_000_000, 0.0), (4_500_000, 1e-7), (2_400_000, 2e-3), (2_400_001, 2.1e-3)])
    ]
    for text in (plots.kld_distributions(rows), plots.size_against_quality(points)):
        root = ElementTree.fromstring(text)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.attrib.get(name, 0)) <= width
            for name in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.attrib.get(name, 0)) <= height


def test_names_of_files_that_lie_together_do_not_overlap() -> None:
    points = [plots.Point(name=name, size=2_400_000, kld=2e-3, low=1e-3, high=3e-3) for name in ("one", "two", "three")]
    root = ElementTree.fromstring(plots.size_against_quality(points))
    heights = [float(text.attrib["y"]) for text in root.iter("text") if text.attrib["class"] == "name"]
    assert len(heights) == 3
    assert min(abs(a - b) for i, a in enumerate(heights) for b in heights[:i]) >= 16


def task_by_hand(prompts: int = 2) -> dict[str, Any]:
    scores = {metric: estimate(40.0) for metric in tasks.METRICS}
    apart = {"difference": {"value": -0.4, "low": -1.2, "high": 0.3}, "within": 1.2}
    rows = [
        {
            "messages": [{"role": "user", "content": f"ⵎⴰⵜⵜⴰ <{number}>?"}],
            "references": ["right & good", "also right"],
            "answers": {"original": "yes", "bundle-fp32": "yes", "bundle-int8": "no"},
        }
        for number in range(prompts)
    ]
    return {
        "schema": 1,
        "model": "a/b",
        "revision": "c" * 40,
        "task": {"file": "task.jsonl", "sha256": "d" * 64, "prompts": prompts},
        "tokens": 32,
        "tools": {"ai-edge-litert": "2.3.0"},
        "sacrebleu": {"chrf": "nrefs:1", "bleu": "nrefs:1"},
        "scores": {name: scores for name in ("original", "bundle-fp32", "bundle-int8")},
        "against_original": {
            "bundle-fp32": {**dict.fromkeys(tasks.METRICS, apart), "identical": 1.0},
            "bundle-int8": {**dict.fromkeys(tasks.METRICS, apart), "identical": 0.0},
        },
        "rows": rows,
    }


def test_a_tasks_page_is_well_formed_loads_nothing_and_says_how_far_apart() -> None:
    page = verification.render_task(task_by_hand())
    found = outline(page)
    assert not found.links and "script" not in found.seen
    assert (
        "bundle-int8: within 1.2 points in exact match, 1.2 points in chrF, 1.2 points in BLEU of the original" in page
    )
    assert "-0.4<small>-1.2 – +0.3</small>" in page and "40.0<small>36.0 – 44.0</small>" in page
    assert "ⵎⴰⵜⵜⴰ &lt;1&gt;?" in page and "right &amp; good" in page
    assert page.count("identical</span>") == page.count("differs</small>") == 2


@pytest.mark.parametrize(("prompts", "rough"), [(tasks.FEWEST - 1, True), (tasks.FEWEST, False)])
def test_few_prompts_are_said_to_be_few(prompts: int, rough: bool) -> None:
    assert (f"{prompts} prompts are few" in verification.render_task(task_by_hand(prompts))) is rough


def test_a_large_task_shows_its_beginning_and_says_where_the_rest_is() -> None:
    page = verification.render_task(task_by_hand(203))
    assert page.count(">prompt<") == 200 and "The first 200 of 203; report.json has all." in page
