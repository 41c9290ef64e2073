"""Evaluation piece by piece: what is kept, what another text or task costs, when a model is loaded."""

from dataclasses import replace

import pytest

from moeprune.calibration.text import TextFiles
from moeprune.errors import InputError
from moeprune.evaluation.speed import Speed
from moeprune.models.source import ModelSource
from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.progress import Silent
from moeprune.pipeline.run import run


class Computed(Silent):
    """Notes which stages were computed, and what was said of each variant."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.told: dict[str, dict] = {}

    def computing(self, stage, key, folder) -> None:
        self.stages.append(stage)

    def evaluated(self, variant, metrics) -> None:
        self.told[variant] = dict(metrics)


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """``walk(experiment)``: its result, the stages it computed, and how often a model was loaded to be evaluated."""
    loaded = []
    for name in ("load", "load_compressed"):
        original = getattr(ModelSource, name)

        def counted(self, *folder, original=original, name=name):
            loaded.append(name)
            return original(self, *folder)

        monkeypatch.setattr(ModelSource, name, counted)

    def walk(experiment):
        loaded.clear()
        listener = Computed()
        result = run(experiment, StageCache(tmp_path / "cache", listener))
        return result, listener, list(loaded)

    return walk


def evaluating(experiment, **changes):
    return replace(experiment, evaluation=replace(experiment.evaluation, **changes))


def test_another_task_or_text_computes_that_one_only(experiment, walk, texts, tmp_path):
    base = experiment()
    before, _, _ = walk(base)

    more, listener, loaded = walk(evaluating(base, tasks=["cloze"], task_items=4))
    assert listener.stages == [
        "evaluation/dense/task/cloze", "evaluation/dense", "evaluation/pruned/task/cloze", "evaluation/pruned",
    ]  # fmt: skip
    assert loaded == ["load", "load_compressed"]
    for name, metrics in more.variants.items():
        assert {**metrics, "tasks": {}} == before.variants[name]
        assert metrics["tasks"]["cloze"]["n"] == 4
        assert (metrics["tasks"]["cloze"]["metric"], metrics["tasks"]["cloze"]["fewshot"]) == ("acc,none", 0)
        assert listener.told[name] == metrics

    (tmp_path / "third").write_text("one two three four five\n" * 40)
    three = TextFiles({**texts.files, "my text / 3": str(tmp_path / "third")})
    result, listener, loaded = walk(evaluating(base, source=three))
    assert [stage for stage in listener.stages if stage.startswith("evaluation/dense")] == [
        "evaluation/dense/text/my_text___3", "evaluation/dense",
    ]  # fmt: skip
    assert set(result.variants["dense"]["perplexity"]) == {"numbers", "letters", "my text / 3"}


def test_other_models_and_other_content_under_the_same_name_share_nothing(experiment, walk, texts, tmp_path):
    (tmp_path / "letters").write_text("the end of the alphabet: u v w x y z\n" * 40)
    other_text = TextFiles({**texts.files, "letters": str(tmp_path / "letters")})
    base = experiment()
    walked = [base, evaluating(base, source=other_text), experiment("deepseek_v2")]
    found = [walk(each)[0].variants["dense"]["perplexity"]["letters"] for each in walked]
    assert len(set(found)) == 3


def test_what_is_known_loads_no_model(experiment, walk):
    base = evaluating(experiment(), tasks=["cloze", "copy"], task_items=4)
    walk(base)
    _, listener, loaded = walk(base)
    assert (listener.stages, loaded) == ([], [])
    result, listener, loaded = walk(evaluating(base, tasks=[{"name": "cloze", "metric": "acc"}]))
    assert (listener.stages, loaded) == (["evaluation/dense", "evaluation/pruned"], [])
    assert list(result.variants["dense"]["tasks"]) == ["cloze"]
    _, listener, loaded = walk(evaluating(base, batch_size="auto"))
    assert (listener.stages, loaded) == ([], [])


def test_the_artifact_of_an_evaluation_counts_all_its_parts(experiment, tmp_path):
    cache = StageCache(tmp_path / "cache")
    (first,) = [made for made in run(experiment(), cache).stages if made.stage == "evaluation/dense"]
    (second,) = [made for made in run(experiment(), cache).stages if made.stage == "evaluation/dense"]
    parts = [*(cache.root / "evaluation" / "dense").glob("*/*/*/result.json"), first.folder / "metrics.json"]
    assert len(parts) == 2 + 1
    assert (first.cached, second.cached) == (False, True)
    assert first.seconds == pytest.approx(second.seconds)
    assert first.folder == second.folder
    more = evaluating(experiment(), tasks=["cloze"], task_items=2)
    (third,) = [made for made in run(more, cache).stages if made.stage == "evaluation/dense"]
    assert not third.cached
    assert third.seconds > first.seconds


def test_speed_is_measured_in_every_run_and_told_with_the_metrics(experiment, walk):
    fast = Speed(batch_size=1, prompt_tokens=4, new_tokens=2, repeats=1)
    base = evaluating(experiment(), speed=fast)
    for _ in range(2):
        result, listener, _ = walk(base)
        for name, metrics in result.variants.items():
            assert metrics["speed"]["decode_tokens_per_second"] > 0
            assert metrics["speed"]["interleaved"] is True
            assert listener.told[name]["speed"] == metrics["speed"]
    assert listener.stages == []
    result, _, _ = walk(experiment())
    assert all("speed" not in metrics for metrics in result.variants.values())


@pytest.mark.parametrize(("free", "together"), [(2**40, True), (1, False)])
def test_models_take_turns_where_the_memory_of_the_job_holds_them_all(experiment, walk, monkeypatch, free, together):
    monkeypatch.setattr("moeprune.pipeline.evaluating.free_bytes", lambda _device: free)
    fast = Speed(batch_size=1, prompt_tokens=4, new_tokens=2, repeats=1)
    result, _, _ = walk(evaluating(experiment(), speed=fast))
    assert [metrics["speed"]["interleaved"] for metrics in result.variants.values()] == [together] * 2


def test_the_speed_of_a_model_on_disk_is_refused_before_anything_is_computed(experiment, walk, tmp_path):
    base = experiment()
    streamed = replace(base, model=replace(base.model, streaming="always"))
    with pytest.raises(InputError, match=r"(?s)evaluation\.speed times models in memory.*model\.streaming=never"):
        walk(evaluating(streamed, speed=Speed()))
    assert not (tmp_path / "cache").exists()
