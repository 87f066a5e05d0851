"""Engines in a file: what it may say, and what becomes of one that is wrong."""

import asyncio
import json
import logging

import pytest

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.config import FrontConfig
from headway.front.discovery import create_source
from headway.front.discovery.file import read_instances

TOML = """
[[instances]]
name = "a"
url = "http://10.0.0.1:8000"
ranks = 4
"""
YAML = """
instances:
  - name: a
    url: http://10.0.0.1:8000
    ranks: 4
"""
JSON = '[{"name": "a", "url": "http://10.0.0.1:8000", "ranks": 4}]'
LLM_D = """
endpoints:
  - name: vllm-0
    address: "10.0.0.1"
    port: "8000"
    labels:
      llm-d.ai/role: prefill
  - name: vllm-1
    namespace: inference
    address: "10.0.0.2"
    port: 8000
    labels:
      llm-d.ai/role: decode
"""


def config(file, **cluster):
    return FrontConfig.parse({"discovery": {"file": str(file), "interval_s": 0.002}} | cluster)


@pytest.mark.parametrize(("suffix", "text"), [("toml", TOML), ("yaml", YAML), ("yml", YAML), ("json", JSON)])
def test_the_same_engines_stand_in_any_of_three_formats(tmp_path, suffix, text):
    file = tmp_path / f"engines.{suffix}"
    file.write_text(text)
    (engine,) = read_instances(file, config(file).discovery)
    assert (engine.name, engine.url, engine.ranks) == ("a", "http://10.0.0.1:8000", 4)


def test_a_file_of_llm_d_is_read_as_it_is(tmp_path):
    file = tmp_path / "endpoints.yaml"
    file.write_text(LLM_D)
    spec = config(file, disaggregated=True).discovery
    first, second = read_instances(file, spec)
    assert (first.name, first.url, first.role) == ("vllm-0", "http://10.0.0.1:8000", Role.PREFILL)
    assert (second.name, second.role) == ("inference.vllm-1", Role.DECODE)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("e.toml", "[[instances]\n", "e.toml: not TOML: "),
        ("e.json", '{"instances": [', "e.json: not JSON: "),
        ("e.yaml", "instances: [a: b: c]", "e.yaml: not YAML: "),
        ("e.yaml", "", "e.yaml: instances must be a list of tables"),
        ("e.toml", "", "e.toml: needs the list instances or the list endpoints, and nothing else"),
        ("e.toml", "instances = 3", "e.toml: instances must be a list of tables"),
        ("e.json", '{"instances": [], "more": 1}', "and nothing else"),
        ("e.json", '["http://a:1"]', "must be a list of tables"),
        ("e.json", '[{"name": "a"}]', "e.json: instances[0]: missing key url"),
        (
            "e.json",
            '[{"name": "a", "url": "http://a:1", "rank": 2}]',
            "instances[0]: unknown key rank: did you",
        ),
        ("e.json", JSON.replace("}]", "}," + JSON[1:]), "e.json: two engines are called 'a'"),
        (
            "e.json",
            JSON.replace("}]", "}," + JSON[1:].replace('"a"', '"b"')),
            "e.json: instance 'b': http://10.0.0.1:8000 is the address of 'a' already",
        ),
        ("e.json", "[" * 100_000, "e.json: not JSON: nested too deeply"),
        ("e.json", JSON.replace('"ranks": 4', '"role": "decode"'), "but the cluster is aggregated"),
        ("e.json", '{"endpoints": [{"name": "a", "address": "b", "port": "x"}]}', "endpoints[0]: port: "),
        (
            "e.json",
            '{"endpoints": [{"name": "a", "address": "b/c", "port": 1}]}',
            "endpoints[0]: address: ",
        ),
        ("e.txt", "", "e.txt: a file of engines ends in .toml, .json, .yaml or .yml"),
    ],
)
def test_a_wrong_file_is_one_line_at_the_start(tmp_path, name, text, why):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        create_source(config(file))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text_and_a_file_that_is_not_there_are_one_line_too(tmp_path):
    file = tmp_path / "e.json"
    with pytest.raises(ConfigError, match="cannot read the engines: No such file"):
        create_source(config(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"e\.json: not JSON: "):
        create_source(config(file))


def test_without_a_table_nothing_is_found():
    assert create_source(FrontConfig.parse({})) is None


def test_the_file_is_read_again_when_it_changes_and_a_wrong_one_keeps_the_last(tmp_path, caplog):
    file = tmp_path / "engines.json"

    def write(text):
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(file)

    async def check():
        write(JSON)
        sets, source = asyncio.Queue(), create_source(config(file))
        following = asyncio.create_task(source.follow(sets.put_nowait))
        assert [each.ranks for each in (await sets.get()).instances] == [4]
        write(JSON.replace("4", "5"))
        assert [each.ranks for each in (await sets.get()).instances] == [5]
        write("[")
        while not caplog.records:
            await asyncio.sleep(0.001)
        file.unlink()
        while len(caplog.records) < 2:
            await asyncio.sleep(0.001)
        write("[]")
        assert (await sets.get()).instances == ()
        assert sets.empty()
        following.cancel()

    with caplog.at_level(logging.ERROR, "headway.discovery"):
        asyncio.run(asyncio.wait_for(check(), 5.0))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("engines not read again: ") and "not JSON" in first
    assert "cannot read the engines" in second


def engine(name, **keys):
    return {"name": name, "url": f"http://10.0.0.{ord(name) - 96}:8000"} | keys


def test_a_wrong_entry_leaves_its_engine_as_it_was_and_keeps_no_other_out(tmp_path, caplog):
    file = tmp_path / "engines.json"

    def write(*entries):
        new = tmp_path / "new"
        new.write_text(json.dumps(entries))
        new.replace(file)

    async def check():
        write(engine("a", ranks=4), engine("b"))
        sets, source = asyncio.Queue(), create_source(config(file))
        following = asyncio.create_task(source.follow(sets.put_nowait))
        assert [each.name for each in (await sets.get()).instances] == ["a", "b"]
        write(
            engine("a", rank=5),
            engine("c"),
            engine("d", role="decode"),
            engine("e", url="http://10.0.0.3:8000"),
        )
        found = {each.name: each.ranks for each in (await sets.get()).instances}
        assert found == {"a": 4, "c": 1}
        write(engine("a", ranks=5), engine("b"), {"url": "http://10.0.0.9:1"})  # whose is it?
        while not any("missing key name" in each for each in caplog.messages):
            await asyncio.sleep(0.001)
        assert sets.empty()
        following.cancel()

    with caplog.at_level(logging.ERROR, "headway.discovery"):
        asyncio.run(asyncio.wait_for(check(), 5.0))
    left = [each for each in caplog.messages if each.startswith("an engine is left as it was: ")]
    assert len(left) == 3
    assert any("unknown key rank" in each for each in left)


def test_a_changed_configmap_is_seen_through_its_link(tmp_path):
    """The kubelet swaps a link to a directory; the file's own path stays."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        text = json.dumps([{"name": f"engine-{number}", "url": "http://a:1"}])
        (tmp_path / str(number) / "engines.json").write_text(text)
    data = tmp_path / "..data"
    data.symlink_to(tmp_path / "1")

    async def check():
        sets, source = asyncio.Queue(), create_source(config(data / "engines.json"))
        following = asyncio.create_task(source.follow(sets.put_nowait))
        assert (await sets.get()).instances[0].name == "engine-1"
        (tmp_path / "next").symlink_to(tmp_path / "2")
        (tmp_path / "next").replace(data)
        assert (await sets.get()).instances[0].name == "engine-2"
        following.cancel()

    asyncio.run(asyncio.wait_for(check(), 5.0))
