"""Bad input: one line that names the file, the row as an editor counts it, and what is wrong."""

import gzip
import json
import re
from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.workload import load_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,374,44\n"
MOONCAKE = '{"timestamp": 9, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
SERVEGEN = "timestamp,input_tokens,output_tokens,reason_tokens\n0.5,280,694,0\n"

BROKEN = {
    "a number that is none": (
        AZURE + "2023-11-16 18:17:04,37x,44\n",
        3,
        "ContextTokens must be a number, got '37x'",
    ),
    "half a token": (SERVEGEN + "0.6,280.5,1,0\n", 3, "input_tokens must be a whole number, got '280.5'"),
    "an empty cell": (SERVEGEN + "0.6,280,,0\n", 3, "output_tokens must be a number, got ''"),
    "a date that is none": (AZURE + "yesterday,374,44\n", 3, "TIMESTAMP must be like 2023-11-16 18:17:03.97"),
    "a time that is none": (SERVEGEN + "nan,280,1,0\n", 3, "timestamp must be a number, got 'nan'"),
    "a short row": (AZURE + "2023-11-16 18:17:04,374\n", 3, "2 columns, where the header has 3"),
    "a long row": (AZURE + "2023-11-16 18:17:04,1,374,44\n", 3, "4 columns, where the header has 3"),
    "a negative length": (
        AZURE + "2023-11-16 18:17:04,374,-4\n",
        3,
        "GeneratedTokens must be at least 1, got -4",
    ),
    "a prompt of nothing": (
        AZURE + "2023-11-16 18:17:04,0,4\n",
        3,
        "ContextTokens must be at least 1, got 0",
    ),
    "an absurd length": (SERVEGEN + "0.6,9999999999,1,0\n", 3, "input_tokens must be at most 2147483647"),
    "time going backwards": (AZURE + "2023-11-16 18:17:01.5,374,4\n", 3, "time goes backwards by 1.5 s"),
    "an empty line counted": (AZURE + "\n2023-11-16 18:17:04,a,4\n", 4, "ContextTokens must be a number"),
    "a header only": (AZURE.splitlines()[0], 2, "ends without any request"),
    "failed requests only": (
        BURSTGPT + "5,GPT-4,7,0,7,API log\n",
        3,
        "without any request but 1 that failed",
    ),
    "a failed row broken": (
        BURSTGPT + "5,GPT-4,7,-1,7,API log\n",
        2,
        "Response tokens must be at least 0, got -1",
    ),
    "an empty file": ("", 1, "the file is empty"),
    "an empty first line": ("\n" + AZURE, 1, "starts with an empty line"),
    "a column missing": (
        AZURE.replace("GeneratedTokens", "Tokens"),
        1,
        "no column 'GeneratedTokens' in the header",
    ),
    "no header": (AZURE.splitlines()[1], 1, "starts like no known trace format. Known are Azure: TIMESTAMP,"),
    "blocks of no size": (
        MOONCAKE + MOONCAKE.replace("600", "6000"),
        2,
        "hash_ids names 2 blocks, but 6000 tokens are 12 blocks of 512 (no block size fits all rows)",
    ),
    "blocks of two sizes": (
        MOONCAKE.replace("[0, 1]", json.dumps([*range(38)])) + MOONCAKE,
        2,
        "hash_ids names 2 blocks, but 600 tokens are 38 blocks of 16 (no block size fits all rows)",
    ),
    "another table": ("a,b,c\n1,2,3\n", 1, "Mooncake: {.*; BurstGPT: Timestamp,.*; ServeGen: timestamp,"),
    "broken JSON": (MOONCAKE + '{"timestamp": 9,\n', 2, "not a JSON object"),
    "JSON of another kind": (MOONCAKE + "[1, 2]\n", 2, "not a JSON object"),
    "a key missing": (
        MOONCAKE.replace("output", "out"),
        1,
        "no 'output_length' (found timestamp, input_length,",
    ),
    "a JSON null": (
        MOONCAKE + MOONCAKE.replace("600", "null"),
        2,
        "input_length must be a number, got 'None'",
    ),
    "hashes of another kind": (
        MOONCAKE.replace("[0, 1]", '["a"]'),
        1,
        "hash_ids must be a list of whole numbers",
    ),
    "milliseconds going back": (MOONCAKE + MOONCAKE.replace("9", "4"), 2, "time goes backwards by 0.005 s"),
}


def complaint(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("text", "row", "says"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_the_message_names_file_row_and_fault(
    tmp_path: Path, name: str, text: str, row: int, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    pattern = says if ".*" in says else re.escape(says)
    assert re.match(re.escape(f"{path} row {row}: ") + ".*" + pattern, complaint(path))


def test_no_such_file(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.csv") == f"{tmp_path}/none.csv: No such file or directory"


def test_a_directory(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path}: Is a directory"


def test_not_gzip_in_spite_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_text(AZURE)
    assert complaint(path) == f"{path} row 1: cannot be read: Not a gzipped file (b'TI')"


@pytest.mark.parametrize("fault", ["cut off", "damaged"])
def test_broken_gzip(tmp_path: Path, fault: str) -> None:
    packed = gzip.compress((AZURE + "2023-11-16 18:17:03,374,44\n" * 5_000).encode())
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(packed[:-20] if fault == "cut off" else packed[:-6] + b"\0" * 6)
    assert re.match(re.escape(str(path)) + r" row \d+: cannot be read: ", complaint(path))


def test_not_utf8_is_found_in_its_row(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes((AZURE + "2023-11-16 18:17:04,37").encode() + b"\xff,44\n" + b"\xfe")
    assert complaint(path) == f"{path} row 3: not UTF-8 (byte 0xff at column 23)"


GUIDELLM = {"metadata": {"version": 1}, "args": {}, "benchmarks": [{"timestamp": 3}]}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_guidellm_report_is_named_for_what_it_is(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(GUIDELLM, indent=indent))
    with pytest.raises(ConfigError, match=r"json: this is a guidellm benchmark report, not a trace$"):
        load_trace(path)


def test_another_json_document_is_no_trace_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"requests": []}, indent=2))
    with pytest.raises(ConfigError, match="this is one JSON document, not a trace"):
        load_trace(path)
