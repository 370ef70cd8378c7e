"""The run report: complete, true to result.json, self-contained, safe with any text, and fit to be read."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.report.chart import Series, chart, nice_ticks
from ciphertune.report.costs import CostMeter
from ciphertune.report.page import _train, count, duration, look_up, number, percent, render, size
from ciphertune.report.redact import HIDDEN, redacted, toml
from ciphertune.runs.config import load_config, parse_config
from ciphertune.runs.demo import run_demo
from ciphertune.runs.train import read_comparison, run_training
from ciphertune.traffic import total

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("report"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SECTIONS = ("loss", "rate", "speed", "time", "layers", "traffic", "share", "security", "reproduce")
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Reads a page; one whose tags do not match is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.figures: list[tuple[str, str, str]] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.figures.append((values["data-key"], values["value"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.texts.append(data)
        if self.open and self.open[-1] == "data":
            key, value, text = self.figures[-1]
            self.figures[-1] = key, value, text + data

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def ids(self) -> list[str]:
        return [values["id"] for _, values in self.tags if "id" in values]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, project_in: Callable[[Path], Path]) -> Path:
    """The output of an encrypted run beside one in the clear, with evaluations."""
    folder = project_in(tmp_path_factory.mktemp("trained"))
    config = load_config(folder / "run.toml")
    other = dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, output=str(folder / "clear"), checkpoint_dir=None, checkpoint_every=None
        ),
    )
    run_training(other)
    result = run_training(dataclasses.replace(config, to="mlwe"), compare=folder / "clear" / "result.json")
    assert result.report == str(folder / "out" / "report.html")
    return folder


@pytest.fixture(scope="module")
def resumed(trained: Path) -> Path:
    """The output of a run that went on from its first checkpoint."""
    config = load_config(trained / "run.toml")
    shutil.rmtree(trained / "ck" / "checkpoint-8")
    run_training(
        dataclasses.replace(
            config, to="mlwe", training=dataclasses.replace(config.training, output=str(trained / "again"))
        ),
        resume=True,
    )
    return trained / "again"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, to="simulation?seed=3", quick=True, steps=6)
    return folder


@pytest.fixture(params=["trained", "demo", "resumed"])
def run(request: pytest.FixtureRequest) -> tuple[Page, dict[str, Any]]:
    """A page, and the result.json beside it."""
    folder: Path = request.getfixturevalue(request.param)
    folder = folder / "out" if request.param == "trained" else folder
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    return page, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_every_section_is_there_and_named(run: tuple[Page, dict[str, Any]]) -> None:
    page, content = run
    sections = [values for tag, values in page.tags if tag == "section"]
    assert tuple(values["id"] for values in sections) == SECTIONS
    assert len(set(page.ids)) == len(page.ids)
    assert all(values["aria-labelledby"] in page.ids for values in sections)
    assert [values["lang"] for tag, values in page.tags if tag == "html"] == ["en"]
    assert content["security"] in page.text
    assert content["costs"]["versions"]["torch"] in page.text
    assert content["costs"]["machine"]["platform"] in page.text
    assert content["adapter"] in page.text


def test_nothing_is_loaded_and_nothing_runs(run: tuple[Page, dict[str, Any]]) -> None:
    page, _ = run
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "form", "a", "base", "image", "use"}
    for tag, values in page.tags:
        for name, value in values.items():
            assert name not in ("src", "href", "srcset", "action", "data", "poster", "background"), (tag, name)
            assert not name.startswith("on")
            assert "url(" not in value
    css = "".join(page.styles)
    assert "{" in css
    assert "url(" not in css
    assert "@import" not in css
    policies = [v["content"] for t, v in page.tags if v.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
UNITS |= {"%": 0.01, "trillion": 1e12, "billion": 1e9, "million": 1e6, "": 1.0}


def test_figures_are_those_of_result_json(run: tuple[Page, dict[str, Any]]) -> None:
    page, content = run
    seen = set()
    for key, value, text in page.figures:
        true = look_up(content, key)
        assert str(true) == value, key
        shown = re.fullmatch(r"(-?[\d.,]+(?:e[-+]?\d+)?) ?(\D*)", text)
        assert shown is not None, (key, text)
        digits, unit = shown[1].replace(",", ""), UNITS[shown[2]]
        mantissa = digits.partition("e")[0]
        places = len(mantissa.partition(".")[2])
        scale = 10.0 ** int(digits.partition("e")[2] or 0) * unit
        # A whole number may have been rounded to some of its digits only where it is large.
        assert float(mantissa) * scale == pytest.approx(true, abs=0.51 * scale * 10.0**-places, rel=6e-4), (key, text)
        seen.add(key)
    wanted = {
        *("outsourced_fraction", "traffic.requests", "traffic.retries", "traffic.bytes_up", "traffic.bytes_down"),
        *("costs.seconds", "costs.outsourced_weights", "costs.client_weights"),
        *("costs.outsourced_operations", "costs.client_operations"),
        *(f"costs.phases.{name}" for name in ("encrypt", "decrypt", "network", "worker", "rest")),
        *(f"costs.groups.{n}.bytes_up" for n in range(len(content["costs"]["groups"]))),
    }
    if "evaluations" in content:
        wanted |= {"losses.-1", *(f"evaluations.{n}.eval_loss" for n in range(len(content["evaluations"])))}
    else:
        wanted |= {"plaintext.losses.-1", "encrypted.losses.-1", "encrypted.held_out", "encrypted.units_per_second"}
    if content["costs"]["set_up"]["weights"]:
        wanted |= {"costs.set_up.weights", "costs.set_up.seconds"}
    assert wanted <= seen
    assert ("security_bits" in seen) == (content["security_bits"] is not None)


def test_curves_have_every_point(run: tuple[Page, dict[str, Any]]) -> None:
    page, content = run
    paths = {}
    for _, values in page.tags:
        if values.get("class", "").startswith("line "):
            paths.setdefault(values["class"], values["d"])
    expected = {"own": len(content["losses" if "losses" in content else "encrypted"])}
    if "plaintext" in content:
        expected = {"own": content["steps"], "other": content["steps"]}
        curves = {"own": content["encrypted"]["losses"], "other": content["plaintext"]["losses"]}
    else:
        expected = {"own": content["steps"], "held": len(content["evaluations"])}
        curves = {"own": content["losses"], "held": [e["eval_loss"] for e in content["evaluations"]]}
        if content["comparison"]:
            curves["other"] = content["comparison"]["losses"]
            expected["other"] = len(curves["other"])
    assert set(paths) == {f"line {name}" for name in expected}
    heights = {}
    for name, count_ in expected.items():
        places = [tuple(map(float, part.split())) for part in paths[f"line {name}"][1:].split("L")]
        assert len(places) == count_
        assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in places)
        heights[name] = [y for _, y in places]
    # One scale for all: heights fall in proportion as losses rise.
    pairs = [(v, y) for name in curves for v, y in zip(curves[name], heights[name], strict=True)]
    (low, bottom), (high, top) = min(pairs), max(pairs)
    for value, y in pairs:
        assert y == pytest.approx(bottom + (value - low) / (high - low) * (top - bottom), abs=0.2)


def test_the_costs_add_up(run: tuple[Page, dict[str, Any]]) -> None:
    _, content = run
    costs, traffic = content["costs"], content["traffic"]
    sums = total(costs["groups"])
    assert {name: sums[name] for name in traffic} == pytest.approx(traffic)
    assert sum(costs["phases"].values()) == pytest.approx(costs["seconds"])
    phases = costs["phases"]
    assert (phases["encrypt"], phases["decrypt"]) == (traffic["encrypt_seconds"], traffic["decrypt_seconds"])
    assert phases["worker"] == min(traffic["evaluate_seconds"], traffic["wait_seconds"])
    assert phases["worker"] + phases["network"] == pytest.approx(traffic["wait_seconds"])
    assert all(seconds >= 0 for seconds in phases.values())
    assert costs["phases"]["worker"] > 0 < costs["phases"]["rest"]
    weights = costs["outsourced_weights"], costs["client_weights"]
    assert weights[0] / sum(weights) == pytest.approx(content["outsourced_fraction"])
    assert costs["outsourced_operations"] > 0 < costs["client_operations"]
    assert costs["encrypted"] == (content["security_bits"] is not None)


def test_a_resumed_run_says_what_it_knows(trained: Path, resumed: Path) -> None:
    whole = json.loads((trained / "out" / "result.json").read_text())
    content = json.loads((resumed / "result.json").read_text())
    page = Page((resumed / "report.html").read_text())
    assert (whole["costs"]["first_step"], content["costs"]["first_step"]) == (1, 5)
    assert len(content["losses"]) == len(whole["losses"]) == 8
    # The evaluation before the first step is the whole run's alone: 8 forward products.
    assert content["traffic"]["requests"] == (whole["traffic"]["requests"] - 8) / 2
    assert "A resumed run" in page.text
    assert "from step 5 on" in page.text
    banners = [values["class"] for tag, values in page.tags if values.get("class", "").startswith("banner")]
    assert banners == ["banner rehearsal", "banner info"], "the worker was in this process"
    assert "resumed" not in Page((trained / "out" / "report.html").read_text()).text


def test_a_run_with_nothing_left_to_do_has_a_report_too(trained: Path) -> None:
    content = json.loads((trained / "out" / "result.json").read_text())
    content["costs"] |= {"first_step": 9, "seconds": 0.0, "groups": [], "outsourced_operations": 0}
    content["costs"] |= {"client_operations": 0, "phases": dict.fromkeys(content["costs"]["phases"], 0.0)}
    content["evaluations"] = []
    page = Page(render(content))
    assert "not counted in this run" in page.text
    content |= {"history": [], "losses": [], "comparison": None}
    assert "nothing to draw" in Page(render(content)).text


def test_the_page_says_where_the_worker_was_and_how_to_do_it_again(trained: Path) -> None:
    content = json.loads((trained / "out" / "result.json").read_text())
    to = "mlwe+zmq://10.0.0.5:5555?curve=keys&client=me"
    content["command"] = ["ciphertune", "train", "/data/my run.toml", "--to", to, "--plugin", "mlflow?token=abc"]
    banners = {}
    for encrypted in (True, False):
        for remote in (True, False):
            content["costs"] |= {"encrypted": encrypted, "remote": remote}
            page = Page(render(content))
            (banner,) = [values["class"] for tag, values in page.tags if values.get("class", "").startswith("banner")]
            banners[encrypted, remote] = banner.removeprefix("banner ")
    assert banners == {
        (True, True): "good", (True, False): "rehearsal", (False, True): "bad", (False, False): "rehearsal"
    }  # fmt: skip
    assert "Rehearsal: the worker is in this process" in page.text
    assert "Fine-tuning model" in page.text
    assert (
        "ciphertune train '/data/my run.toml' --to 'mlwe+zmq://10.0.0.5:5555?curve=(not shown)&client=me'" in page.text
    )
    assert "abc" not in page.text
    assert f'name = "{trained / "model"}"' in page.text, "paths are those from anywhere"


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}</style></title>&amp;\u202e"


def _hostile(value: Any) -> Any:
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [_hostile(part) for part in value]
    return {name: _hostile(part) for name, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("checked", "words"),
    [("before decryption", "before it was decrypted"), ("after decryption", "tolerance"), ("no", "were not checked")],
)
def test_wrong_answers_are_told(demo: Path, checked: str, words: str) -> None:
    """On top of the page, and how answers were checked among what is not protected."""
    content = json.loads((demo / "result.json").read_text(encoding="utf-8"))
    assert (content["checked"], content["excluded"]) == ("no", [])
    row = {"worker": "<b>one", "when": "2026-01-02T03:04:05+00:00", "why": "it gave a wrong answer for 0 (forward)"}
    content |= {"checked": checked, "excluded": [row]}
    content["costs"] |= {"encrypted": True}
    page = render(content)
    Page(page)
    assert "A wrong answer was refused" in page
    assert "&lt;b&gt;one" in page
    assert "2026-01-02 03:04:05 UTC" in page
    assert words in page


def test_hostile_text_stays_text(run: tuple[Page, dict[str, Any]]) -> None:
    page, content = run
    hostile = _hostile(content)
    hostile["costs"]["versions"][HOSTILE] = HOSTILE
    hostile["costs"]["machine"][HOSTILE] = HOSTILE
    if "config" in hostile:
        hostile["config"]["lora"]["target_modules"] = [HOSTILE, HOSTILE]
    found = Page(render(hostile))
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in page.tags}
    assert {name for _, values in found.tags for name in values} <= {n for _, values in page.tags for n in values}
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7*7 }}" in found.text
    assert "".join(found.styles) == "".join(page.styles)


@pytest.mark.parametrize("option", ["curve", "key", "token", "api_key", "password", "client_secret", "auth", "ca_cert"])
def test_what_could_be_secret_is_not_shown(trained: Path, option: str) -> None:
    content = json.loads((trained / "out" / "result.json").read_text())
    secret = "hush-4711"
    content["to"] = f"mlwe+zmq://me:{secret}@10.0.0.5:5555?request_bits=24&{option}={secret}"
    content["config"] |= {"to": content["to"], "plugins": [f"mlflow?uri=http://a:{secret}@b&{option}={secret}"]}
    content["comparison"]["to"] = content["to"]
    text = render(content)
    assert secret not in text
    assert "request_bits=24" in text
    assert HIDDEN in text


@pytest.mark.parametrize("text", ["mlwe", "simulation?seed=1", "mlwe+zmq://10.0.0.5:5555,ipc:///run/w?insecure=1"])
def test_harmless_selections_are_shown_as_they_are(text: str) -> None:
    assert redacted(text) == text


def test_logins_in_addresses_are_hidden_however_they_are_written() -> None:
    for uri in ("http://a:hush@b/x", "http%3A%2F%2Fa%3Ahush%40b", "a:hu/sh@b"):
        assert "sh" not in redacted(f"mlflow?uri={uri}").replace("not shown", "").removeprefix("mlflow?uri=a:hu/"), uri


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(1e-12, 1e12), st.booleans())
def test_the_configuration_shown_is_the_one_that_ran(text: str, rate: float, norm: bool) -> None:
    written = {
        "to": "mlwe",
        "layers": [text, "b"],
        "model": {"name": text},
        "data": {"source": text, "length": 7},
        "training": {"output": text, "learning_rate": rate, "checkpoint_dir": text},
    }
    config = parse_config(written)
    if norm:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_grad_norm=None))
    import ciphertune.runs.config

    again = parse_config(ciphertune.runs.config.tomllib.loads(toml(dataclasses.asdict(config))))  # type: ignore[attr-defined]
    if norm:
        assert again.training.max_grad_norm == math.inf
        again = dataclasses.replace(again, training=dataclasses.replace(again.training, max_grad_norm=None))
    assert again == config


def test_the_page_names_the_configuration_that_ran(trained: Path) -> None:
    text = Page((trained / "out" / "report.html").read_text()).text
    assert 'to = "mlwe"' in text
    assert "learning_rate = 0.02" in text
    assert "seed = 0" in text


@pytest.mark.parametrize("interleave", [1, 2])
def test_operations_of_a_step_are_exact(interleave: int) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = ciphertune.outsource(
        get_peft_model(network, LoraConfig(r=4, target_modules=["0", "2"])), "mlwe", ["0", "2"]
    )
    session = ciphertune.session_of(model)
    before = session.plugins.names()
    batches = [(torch.randn(16, 32), torch.randint(10, (16,))) for _ in range(3)]
    meter = CostMeter(session, ciphertune.share(model))
    with meter.measuring():
        trainer = ciphertune.LoraTrainer(model, loss_fn=nn.CrossEntropyLoss(), accumulation=2, interleave=interleave)
        trainer.train(batches[:2])
    session.close()
    assert session.plugins.names() == before
    costs = meter.costs()
    phases = costs.phases
    assert sum(phases.values()) == pytest.approx(costs.seconds)
    assert (sum(row["turn_seconds"] for row in costs.groups) > 0) == (interleave > 1)
    # Two micro-batches of 16. Workers: forward of both layers, backward of the second (the first's input needs none).
    assert costs.outsourced_operations == 2 * 16 * (32 * 64 + 64 * 64 + 64 * 64)
    # Client: adapters and their gradients, without that of the first layer's input, and the head twice.
    adapters = (32 * 4 + 4 * 64) + (4 * 64 + 4 * 64 + 32 * 4) + 3 * (64 * 4 + 4 * 64)
    assert costs.client_operations == 2 * 16 * (adapters + 2 * 64 * 10)


def test_counting_changes_no_bit_of_the_training(tiny: Callable[[str], nn.Module]) -> None:
    from remote import batches, with_adapter

    losses = []
    for counted in (False, True):
        model = ciphertune.outsource(with_adapter(tiny("llama")), "simulation?seed=2")
        session = ciphertune.session_of(model)
        meter = CostMeter(session, ciphertune.share(model))
        trainer = ciphertune.LoraTrainer(model, learning_rate=0.01)
        with meter.measuring() if counted else _nothing():
            losses.append(trainer.train(batches(3)).losses)
        session.close()
        assert (meter.costs().outsourced_operations > 0) == counted
    assert losses[0] == losses[1]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_runs_to_compare_with_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    with pytest.raises(ConfigError, match="cannot read"):
        read_comparison(file)
    for text in ("{", "[]", '{"to": "mlwe"}', '{"to": "mlwe", "losses": ["<b>"]}', '{"to": "mlwe", "losses": 3}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"is not a result\.json"):
            read_comparison(file)
    for text in ('{"to": "mlwe", "losses": []}', '{"to": "mlwe", "losses": [NaN]}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="no losses, or some that are not finite"):
            read_comparison(file)


finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=30), st.booleans())
def test_any_curve_can_be_drawn(values: list[float], from_zero: bool) -> None:
    drawn = chart([Series("a", "own", range(1, len(values) + 1), values)], from_zero=from_zero)
    assert drawn is not None
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", drawn.lines[0].path)]
    assert all(-0.1 <= n <= 1000.1 for n in numbers)
    assert len(numbers) == 2 * len(values)
    assert len(drawn.y_ticks) >= 2
    assert len({tick.text for tick in drawn.y_ticks}) == len(drawn.y_ticks)
    assert all(-0.01 <= tick.place <= 100.01 for tick in (*drawn.x_ticks, *drawn.y_ticks))


def test_long_curves_keep_their_ends_and_extremes() -> None:
    values = [math.sin(n / 50) for n in range(20000)]
    values[7777] = 40.0
    drawn = chart([Series("a", "own", range(20000), values)])
    assert drawn is not None
    path = drawn.lines[0].path
    assert path.count("L") < 2000
    assert drawn.lines[0].dots == ""
    places = [tuple(map(float, part.split())) for part in path[1:].split("L")]
    assert (places[0][0], places[-1][0]) == (0, 1000)
    assert min(y for _, y in places) == pytest.approx(1000 - 1000 * (40 + 10) / 50, abs=60)
    assert chart([]) is None


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (size, 0, "0 B"), (size, 999, "999 B"), (size, 999_960, "1 MB"), (size, 19_912_345, "19.9 MB"),
        (size, 3.21e12, "3.21 TB"), (duration, 0.0002, "0.2 ms"), (duration, 3.14159, "3.14 s"),
        (duration, 700, "12 min"), (duration, 9000, "2.5 h"), (count, 999_999, "999,999"),
        (count, 1.5e9, "1.50 billion"),
        (percent, 0.8391, "83.9%"), (number, math.inf, "infinite"), (number, 1.23456e-5, "1.235e-05"),
    ],
)  # fmt: skip
def test_figures_for_people(form: Callable[[float], str], value: float, text: str) -> None:
    assert form(value) == text


def test_ticks_are_round() -> None:
    assert nice_ticks(0.0, 0.01) == [0.0, 0.002, 0.004, 0.006, 0.008, 0.01]
    assert nice_ticks(1, 80, whole=True) == [0.0, 20.0, 40.0, 60.0, 80.0]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_curves_stand_out_in_both_modes(demo: Path) -> None:
    css = "".join(Page((demo / "report.html").read_text()).styles)
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    for mode in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", mode))
        pairs = [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card")]
        pairs += [("good-ink", "good"), ("bad-ink", "bad")]
        for text, ground in pairs:
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for curve in ("own", "other", "held"):  # WCAG 1.4.11
            assert _contrast(colours[curve], colours["paper"]) >= 3, curve


def test_tables_and_pictures_have_names(run: tuple[Page, dict[str, Any]]) -> None:
    page, _ = run
    for tag, values in page.tags:
        if tag == "th":
            assert values["scope"] in ("row", "col")
        if values.get("role") in ("img", "region"):
            assert values["aria-label"]
        if values.get("class") == "scroll":
            assert values["tabindex"] == "0"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_it_without_scrolling_sideways(trained: Path, demo: Path, width: int, tmp_path: Path) -> None:
    pages = [trained / "out" / "report.html", demo / "report.html"]
    long = copy.deepcopy(json.loads((trained / "out" / "result.json").read_text()))
    long["costs"]["groups"][0]["layers"] = ["model.layers.0." + "x" * 200]
    long["to"] = "mlwe+zmq://" + ",".join(f"worker-{n}.example.internal:5555" for n in range(12))
    (tmp_path / "long.html").write_text(render(long))
    # Frames stand for windows: a headless one may not be as narrow as a phone.
    frames = "".join(
        f'<iframe width="{width}" height="900" src="{p.as_uri()}"></iframe>' for p in [*pages, tmp_path / "long.html"]
    )
    measure = (
        "window.onload = () => { document.title = [...document.querySelectorAll('iframe')].map(f => "
        "[f.contentDocument.documentElement.scrollWidth, f.contentDocument.querySelectorAll('section').length, "
        "Math.min(...[...f.contentDocument.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().left))]"
        ").join(';') }"
    )
    wrapper = tmp_path / "frames.html"
    wrapper.write_text(f"<!DOCTYPE html><title></title><script>{measure}</script><body>{frames}</body>")
    dom = _chromium(tmp_path, "--allow-file-access-from-files", "--dump-dom", wrapper.as_uri())
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    for line in found[1].split(";"):
        across, sections, left = map(float, line.split(","))
        assert across <= width
        assert sections == len(SECTIONS)
        assert left >= 0, "a label is cut off"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_in_dark_mode(demo: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    shades = {}
    for mode in ("light", "dark"):
        flags = ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if mode == "dark" else []
        picture = tmp_path / f"{mode}.png"
        _chromium(tmp_path, *flags, "--window-size=800,900", f"--screenshot={picture}", (demo / "report.html").as_uri())
        pixels = imread(picture)[..., :3]
        shades[mode] = float(pixels[5, 5].mean())
        assert pixels.std() > 0.03, "the page is empty"
    assert shades["light"] > 0.95
    assert shades["dark"] < 0.15


def _chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_norms_of_gradients_stand_beside_the_loss(project: Path) -> None:
    config = load_config(project / "run.toml")
    run_training(dataclasses.replace(config, training=dataclasses.replace(config.training, gradient_norms=True)))
    content = json.loads((project / "out" / "result.json").read_text(encoding="utf-8"))
    page = Page((project / "out" / "report.html").read_text(encoding="utf-8"))
    norms = content["gradient_norms"]
    assert {len(values) for values in norms.values()} == {8}
    view = _train(content)["norms"]
    assert [line.name.split()[0] for line in view["chart"].lines] == ["all", "largest", "median"]
    assert all(line.path.count("L") == 7 for line in view["chart"].lines)
    # Heights rise with the logarithm or with the value: the steps of least and greatest norm are those of the curve.
    heights = [-float(place.split()[1]) for place in view["chart"].lines[0].path[1:].split("L")]
    whole = [entry["grad_norm"] for entry in content["history"]]
    assert sorted(range(8), key=heights.__getitem__) == sorted(range(8), key=whole.__getitem__)
    assert {row[0] for row in view["rows"]} == set(norms)
    for name, first, last, largest, step in view["rows"]:
        values = norms[name]
        assert (first, last, largest, values[step - 1]) == (values[0], values[-1], max(values), max(values))
        assert name in page.text
    assert page.ids.index("norms") == page.ids.index("loss") + 2  # beside it
    # Of steps before a resume, or of parameters that a step did not use, there may be none.
    fewer = {name: [math.nan, *values[5:]] for name, values in norms.items()}
    kept = _train({**content, "gradient_norms": fewer})["norms"]
    assert all(line.path.count("L") == 3 for line in kept["chart"].lines)
    assert {row[1] for row in kept["rows"]} == {values[5] for values in norms.values()}


def test_a_run_without_norms_of_parameters_has_no_chart_of_them(trained: Path) -> None:
    assert "norms" not in Page((trained / "out" / "report.html").read_text(encoding="utf-8")).ids
