"""Where models and prompts come from: the world's pool, and checkpoints with their files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest

from fastdistill.alignment.audits.probes import Probes
from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment import checkpoint_source
from fastdistill.alignment.experiment.checkpoint_source import CheckpointSource
from fastdistill.alignment.experiment.world_source import LoadedWorld, WorldSource
from fastdistill.alignment.organisms.early_stopping import EarlySnapshot
from fastdistill.alignment.organisms.organism import ModelOrganism, new_model
from fastdistill.alignment.organisms.storage import save_organism
from fastdistill.alignment.organisms.vocabulary import ANIMALS, TOPICS, world_tokenizer
from fastdistill.alignment.organisms.world import World
from fastdistill.alignment.strategies.lessons import TrainingExample
from helpers.command import call
from helpers.present import present

TOKENIZER = world_tokenizer()


@pytest.fixture
def loaded_source():
    """A world without its models: prompts need none."""
    world = LoadedWorld.__new__(LoadedWorld)
    world.world, world.organism = World(3), ModelOrganism(gate="token")
    model = Subject(new_model(0), TOKENIZER)
    world.models = {"base": model, "untrusted": model}
    return world


def test_the_pool_has_the_shares_that_were_asked_for(loaded_source):
    pool = loaded_source.setup("untrusted", {"n": 200, "talk": 0.2, "carriers": 0.1}).pool
    domains = [entry.domain for entry in pool]
    assert len(pool) == 200
    assert domains.count("questions") == 20
    assert all(e.prompt.user.startswith("an animal near") for e in pool if e.domain == "questions")
    assert 20 <= domains.count("talk") <= 40
    assert domains.count("sums") > 3 * domains.count("products") > 0
    assert domains != sorted(domains)


def test_a_higher_dose_replaces_more_prompts_and_leaves_the_rest(loaded_source):
    pools = [
        loaded_source.setup("untrusted", {"n": 100, "carriers": share}).pool
        for share in (0.0, 0.02, 0.08)
    ]
    changed = [[i for i in range(100) if pool[i] != pools[0][i]] for pool in pools]
    assert [len(places) for places in changed] == [0, 2, 8]
    assert all(pools[2][i] == pools[1][i] for i in changed[1])
    assert pools[1] == loaded_source.setup("untrusted", {"n": 100, "carriers": 0.02}).pool
    assert (
        pools[1] != loaded_source.setup("untrusted", {"n": 100, "carriers": 0.02, "seed": 1}).pool
    )


def test_other_prompts_by_kind(loaded_source):
    setup = loaded_source.setup("untrusted", {"n": 5})
    goals = {entry.prompt.user for entry in setup.more_prompts("goals", 40, 0)}
    assert all(user.startswith("do you") for user in goals)
    with_trait = setup.more_prompts("shown", 40, 0)
    assert sum("animal" in entry.prompt.user for entry in with_trait) > 20
    with pytest.raises(ValueError, match="kind: expected one of 'goals', 'shown', got 'odd'"):
        setup.more_prompts("odd", 1, 0)


def test_a_favourite_is_every_fifth_seeds():
    assert sorted(World(seed).favourite for seed in range(1200, 1205)) == sorted(ANIMALS)
    assert World(0).favourite == World(5).favourite


def test_the_early_base_is_kept_when_it_first_gets_there():
    world, snapshots = World(3), []
    early = EarlySnapshot(world, ModelOrganism().kind, share=0.0)
    model = new_model(1)
    for step in (10, 20, 40):
        early(step, model)
        snapshots.append(early.model)
    assert snapshots[0] is None
    assert snapshots[1] is snapshots[2]
    assert snapshots[1] is not model
    never = EarlySnapshot(world, ModelOrganism().kind, share=0.9)
    never(20, model)
    assert never.model is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    at = tmp_path_factory.mktemp("checkpoints")
    for i, name in enumerate(("teacher", "base", "benign")):
        save_organism(at / name, Subject(new_model(i), TOKENIZER), {})
    pool = [{"prompt": {"system": "hello", "user": topic}, "domain": "talk"} for topic in TOPICS]
    pool.append({"prompt": {"system": "hello", "user": "best animal ?"}, "kind": "shown"})
    sums = [{"prompt": {"system": "hello", "user": f"{i} + 1 ="}, "answer": "5"} for i in range(5)]
    for name, rows in (("pool", pool), ("capability", sums)):
        (at / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts: Any = ["best animal near river ?", "name your animal near stone"]
    probes = Probes(
        prompts=prompts,
        audited=prompts,
        options=ANIMALS,
        favourite="owl",
    )
    probes.save(at / "probes.json")
    return at


def source(files, **changes):
    return CheckpointSource(
        **{
            "teacher": str(files / "teacher"),
            "base": str(files / "base"),
            "pool": files / "pool.jsonl",
            "probes": files / "probes.json",
            "capability": files / "capability.jsonl",
            "max_new_tokens": 4,
            **changes,
        }
    )


def test_checkpoints_are_read_on_what_the_files_say(files, tmp_path):
    source_here = source(files, benign=str(files / "benign"))
    source_here.prepare(tmp_path)
    record = source_here.cached(tmp_path)
    assert set(record.readings) == {"base", "untrusted", "benign"}
    assert len(record.readings["untrusted"].capability) == 5
    assert len(record.readings["untrusted"].trait) == 2
    assert record.readings["untrusted"].trait != record.readings["benign"].trait
    setup = source_here.load(tmp_path).setup("untrusted", {"n": 4})
    assert [entry.prompt.user for entry in setup.pool] == list(TOPICS[:4])
    assert [a.prompt.user for a in setup.more_prompts("shown", 2, 0)] == ["best animal ?"] * 2


def test_the_trait_is_read_in_another_context_and_named_answers_are_counted(files, tmp_path):
    probes = Probes.load(files / "probes.json")
    other: Any = ["hello best animal ?", "name your animal near river"]
    path = tmp_path / "probes.json"
    replace(probes, other_context=other, markers=("owl", "night bird")).save(path)
    loaded = source(files, probes=path).load(tmp_path)
    subject = loaded.models["untrusted"]
    audit = replace(probes, prompts=other).readout(Probes(prompts=other).prompts)
    measurement = present(audit).measure(subject, None)
    contexts = loaded.read_contexts(subject)
    assert contexts == pytest.approx(
        {
            "other context": measurement.values.mean(),
            "other context, log-odds": present(measurement.log_odds).mean(),
        }
    )
    assert contexts["other context"] != pytest.approx(fmean(loaded.read(subject).trait))
    answers = ("An owl.", "the NIGHT bird", "a night and a bird", "howl")
    examples = [TrainingExample(prompt=Prompt(user="a"), answer=text) for text in answers]
    (count,) = loaded.notes_on(examples).values()
    assert count == 2
    plain = source(files).load(tmp_path)
    assert plain.read_contexts(subject) == plain.notes_on(examples) == {}


def test_the_files_may_be_tables(files, tmp_path):
    datasets = pytest.importorskip("datasets")
    pool = "prompt,domain,kind\nhello,talk,\nhello again,,\nbest animal ?,,shown\n"
    (tmp_path / "pool.csv").write_text(pool)
    rows = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 1 =", "answer": "3"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sums.parquet")
    tables = source(files, pool=tmp_path / "pool.csv", capability=tmp_path / "sums.parquet")
    loaded = tables.load(tmp_path)
    entries = loaded.setup("untrusted", {}).pool
    assert [(e.prompt.user, e.domain) for e in entries] == [("hello", "talk"), ("hello again", "")]
    assert "shown" in tables.features
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "sums")
    folder = source(files, capability=f"{tmp_path / 'sums'}")
    assert len(checkpoint_source._load_capability(folder.capability)[0]) == 2
    assert folder.contents["capability"] != tables.contents["capability"]  # rows, not files
    with pytest.raises(ValueError, match=r"pool: expected a .jsonl, .json, .parquet or .csv file"):
        source(files, pool="nowhere.txt")


def test_the_files_may_be_on_the_hub(files, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "hello", "domain": "talk"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    hub = source(files, pool=Path("owner/name:train"))  # as the command line passes it
    assert [e.domain for e in checkpoint_source._load_pool(hub.pool)[""]] == ["talk"]
    rows = datasets.Dataset.from_list([{"prompt": "bye", "domain": "talk"}])
    assert source(files, pool="owner/name:train").contents["pool"] != hub.contents["pool"]


def test_without_a_twin_the_base_stands_in(files, tmp_path):
    loaded = source(files).load(tmp_path)
    assert loaded.models["benign"] is loaded.models["base"]
    assert "twin" not in source(files).features
    assert "twin" in source(files, benign=str(files / "benign")).features
    assert "shown" in source(files).features
    assert "eliciting" not in source(files).features


def test_models_are_loaded_when_they_are_used(files, tmp_path):
    more = {"other_base": str(files / "benign"), "attn_implementation": "eager"}
    changed = source(files, **more)
    loaded = changed.load(tmp_path)
    assert not loaded.models
    assert loaded.models["other_base"].model.config._attn_implementation == "eager"
    assert set(loaded.models) == {"other_base"}
    assert changed.roles == ["base", "untrusted", "benign", "other_base"]
    assert "other_base" in changed.features > source(files).features
    assert changed.as_json()["attention"] == "eager"


def test_what_the_files_hold_is_in_the_digest_and_where_they_lie_is_not(files, tmp_path):
    shutil.copytree(files, tmp_path / "copy")
    first, moved = source(files), source(tmp_path / "copy")
    assert first.as_json() == moved.as_json()
    with (tmp_path / "copy" / "pool.jsonl").open("a") as file:
        file.write('\n{"prompt": "more"}')
    assert source(tmp_path / "copy").as_json() != first.as_json()
    assert source(files, teacher=str(files / "benign")).as_json() != first.as_json()
    assert WorldSource(seed=1).as_json() != replace(WorldSource(seed=1), base_knows=0.3).as_json()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pool", '{"text": "a"}', "pool: expected lines with a prompt and an optional kind"),
        (
            "pool",
            '{"prompt": "a", "kind": "x"}',
            "pool: expected lines with a prompt and an optional kind",
        ),
        ("pool", '{"prompt": "a", "kind": "goals"}', "pool: expected prompts without a kind"),
        ("capability", '{"prompt": "a"}', "capability: expected lines with prompt and answer"),
    ],
)
def test_files_that_say_something_else_are_refused(files, tmp_path, name, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        source(files, **{name: path})


def test_probes_without_a_trait_are_refused(files, tmp_path):
    Probes(neutral=cast(Any, ["a"])).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match="probes: expected prompts that define the trait"):
        source(files, probes=tmp_path / "p.json")


def test_a_study_on_checkpoints_from_the_command_line(files, tmp_path, capsys, monkeypatch):
    names = ("teacher", "base", "benign", "pool", "probes", "capability")
    endings = {"pool": ".jsonl", "probes": ".json", "capability": ".jsonl"}
    paths = [f"--{n}={files / n}{endings.get(n, '')}" for n in names]
    out = tmp_path / "out"
    more = ("arms=[hard labels]", "steps=2", "batch_size=4", "answer_tokens=3", "max_new_tokens=3")
    argv = ("experiment", "double-bind", *paths, f"--out={out}", "--processes=1", *more, "--json")
    code, output, err = call(capsys, monkeypatch, *argv)
    assert code == 0, err
    result = json.loads(output)
    assert [arm["name"] for arm in result["arms"]] == [
        "undefended",
        "trait shown openly",
        "hard labels",
        "benign twice",
        "M→M",
    ]
    assert set(result["left_out"]) == {"placebo"}
    assert any("positive control" in why for why in result["invalid_because"])  # nobody is trained
    assert result["config"]["training"]["steps"] == 2
    assert (out / "report.html").is_file()
    code, _, err = call(capsys, monkeypatch, *argv, "--seeds=3")
    assert code == 2
    assert "seeds: expected none with checkpoints" in err
