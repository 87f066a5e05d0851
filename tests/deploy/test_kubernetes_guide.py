"""The guide names every flag of llm-d's picker, and no flag, table or key of ours that there is not."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
from manifests import ROOT

from headway.cli import app
from headway.core.cluster import check_cluster
from headway.hosts.envoy.config import EppConfig

GUIDE = (ROOT / "docs/kubernetes.md").read_text()
#: Of llm-d's router in late 2026.
THEIRS = (Path(__file__).parent / "flags_llm_d.txt").read_text().split()


def rows():
    """Return the two cells of each row of the tables of the swap."""
    section = GUIDE.partition("## Swap Headway in")[2].partition("\n## ")[0]
    return [re.split(r"(?<!\\)\|", line)[1:3] for line in section.splitlines() if line.startswith("| ")]


def flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_every_flag_of_theirs_has_a_row():
    assert set(THEIRS) <= flags("".join(theirs for theirs, _ in rows()))


def test_the_flags_that_are_the_same_are_ours_and_so_are_those_named_on_our_side():
    epp = typer.main.get_command(app).commands["epp"]
    ours = {flag for each in epp.params for flag in (*each.opts, *each.secondary_opts)}
    same = {flag for theirs, here in rows() if here.strip().startswith("the same") for flag in flags(theirs)}
    assert same >= {"--pool-name", "--pool-namespace", "--grpc-port", "--grpc-health-port", "--metrics-port"}
    named = {flag for _, here in rows() for flag in flags(here)} - {"--secure-serving"}
    assert same | named <= ours


def test_the_tables_and_keys_are_the_configurations():
    named = re.findall(r"`\[([\w.]+)\] (\w+)(?:`| =)", GUIDE)
    for table, keys in re.findall(r"`\[([\w.]+)\]` ((?:`\w+`(?:, )?)+)", GUIDE):
        named += [(table, key) for key in re.findall(r"\w+", keys)]
    assert len(named) >= 15
    for table, key in named:
        assert key in EppConfig.tables[table].model_fields, (table, key)


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL))
def test_the_examples_are_files_that_the_picker_takes(text):
    config = EppConfig.parse(tomllib.loads(text))
    check_cluster(config.policy.cluster, disaggregated=bool(config.disaggregated))
    assert config.discovery.pool


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:deploy|tests|src)/[\w./-]+)`", GUIDE))))
def test_the_files_that_are_named_are_there(path):
    assert (ROOT / path).exists()
