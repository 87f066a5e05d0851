"""Each published format loads as its authors describe it."""

import gzip
import json
import os
from pathlib import Path

import pytest

from headway.workload import Item, load_trace

SHARED = Path(os.environ.get("HEADWAY_SHARED", Path(__file__).parents[3] / "shared")) / "traces"

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:03.9799600,110,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 23:59:59.009930+00:00,2162,5
2024-05-11 00:00:01+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 6000, "input_length": 1024, "output_length": 4, "hash_ids": [0, 7]}
{"timestamp": 6000, "input_length": 511, "output_length": 1, "hash_ids": [9]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
1106,ChatGPT,0,0,0,Conversation log
1200,GPT-4,30,0,30,API log
1278.5,GPT-4,17,382,399,API log
"""
BURSTGPT_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
10,,3.5,ChatGPT,472,18,490,Conversation log
"""
SERVEGEN = """timestamp,input_tokens,output_tokens,reason_tokens
0.0,280,694,600
0.0037,355,375,0
"""


def saved(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_azure_2023_has_seven_decimals_and_no_zone(tmp_path: Path) -> None:
    workload = load_trace(saved(tmp_path, AZURE_2023))
    assert list(workload.items) == [Item(0.0, 4808, 10), Item(0.052, 3180, 8), Item(60.0, 110, 27)]
    assert workload.mean_prompt_tokens == 2699.333333333333333
    assert workload.mean_output_tokens == 15.0
    assert workload.native_rps == 2 / 60


def test_azure_2024_has_a_zone(tmp_path: Path) -> None:
    workload = load_trace(saved(tmp_path, AZURE_2024))
    assert list(workload.items) == [Item(0.0, 2162, 5), Item(1.99007, 2399, 6)]


def test_mooncake_counts_only_full_blocks_as_prefix(tmp_path: Path) -> None:
    workload = load_trace(saved(tmp_path, MOONCAKE, "trace.jsonl"))
    assert list(workload.items) == [
        Item(0.0, 1100, 500, (0, 1), 512),
        Item(3.0, 1024, 4, (0, 7), 512),
        Item(3.0, 511, 1),
    ]
    assert workload.reusable_prompt_share == 512 / (1100 + 1024 + 511)  # block 0, the second time


def json_trace(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(tokens: int, blocks: int, **more: object) -> dict[str, object]:
    return {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": [*range(blocks)]} | more


@pytest.mark.parametrize(
    ("rows", "block_tokens", "full_blocks"),
    [
        ([row(1100, 3)], 512, [2]),
        ([row(100, 7), row(33, 3)], 16, [6, 2]),
        ([row(5, 1), row(2048, 2)], 1024, [0, 2]),  # the first fits every size
        ([row(5, 1)], 512, [0]),  # nothing tells: as Mooncake documents it
    ],
)
def test_the_size_of_a_prefix_block_follows_from_the_number_of_hashes(
    tmp_path: Path, rows: list[dict[str, object]], block_tokens: int, full_blocks: list[int]
) -> None:
    items = load_trace(json_trace(tmp_path / "t.jsonl", rows)).items
    assert items.prefix_block_tokens == block_tokens
    assert [len(item.prefix) for item in items] == full_blocks


def test_bailian_has_seconds_and_blocks_of_16_tokens(tmp_path: Path) -> None:
    chat = {"chat_id": 7, "parent_chat_id": -1, "type": "text", "turn": 1}
    rows = [row(5, 1, timestamp=1.5, **chat), row(36, 3, timestamp=4.0, **chat)]
    workload = load_trace(json_trace(tmp_path / "b.jsonl", rows))
    assert [item.arrival_s for item in workload.items] == [0.0, 2.5]
    assert workload.items.prefix_block_tokens == 16
    assert "Bailian" in workload.source


def test_mooncake_style_rows_may_come_without_hashes(tmp_path: Path) -> None:
    workload = load_trace(saved(tmp_path, '{"timestamp": 0, "input_length": 900, "output_length": 5}\n'))
    assert list(workload.items) == [Item(0.0, 900, 5)]
    assert workload.reusable_prompt_share == 0.0


def test_burstgpt_skips_failed_requests_and_says_so(tmp_path: Path) -> None:
    workload = load_trace(saved(tmp_path, BURSTGPT))
    assert list(workload.items) == [Item(0.0, 472, 18), Item(1273.5, 17, 382)]
    assert workload.source == "trace.csv (BurstGPT trace, 2 requests, 2 failed ones left out)"


def test_burstgpt_release_2_has_more_columns(tmp_path: Path) -> None:
    assert list(load_trace(saved(tmp_path, BURSTGPT_2)).items) == [Item(0.0, 472, 18)]


def test_servegen_reasoning_is_part_of_the_output(tmp_path: Path) -> None:
    assert list(load_trace(saved(tmp_path, SERVEGEN)).items) == [Item(0.0, 280, 694), Item(0.0037, 355, 375)]


@pytest.mark.parametrize("text", [AZURE_2023, AZURE_2024, MOONCAKE, BURSTGPT, SERVEGEN])
def test_gzip_is_known_by_its_bytes_whatever_the_name(tmp_path: Path, text: str) -> None:
    plain = load_trace(saved(tmp_path, text, "plain"))
    for name in ("trace.csv.gz", "trace.bin"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()))
        assert list(load_trace(path).items) == list(plain.items)
        assert load_trace(path).name == "trace"


@pytest.mark.parametrize(
    "text",
    [
        AZURE_2023.replace("\n", "\r\n"),
        "\ufeff" + AZURE_2023,
        AZURE_2023 + "\n\n",
        AZURE_2023.rstrip("\n"),
        AZURE_2023.replace("4808", "4808.0"),
        AZURE_2023.replace("TIMESTAMP", '"TIMESTAMP"'),
    ],
    ids=["windows lines", "byte order mark", "empty lines", "no last newline", "decimals", "quotes"],
)
def test_traces_saved_by_other_programs_load_alike(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(text.encode())
    assert [item.prompt_tokens for item in load_trace(path).items] == [4808, 3180, 110]


@pytest.mark.parametrize(
    ("name", "rows", "prompt_mean", "output_mean", "rps"),
    [
        ("azure2023_conv.csv.gz", 19_366, 1155, 211, 5.53),
        ("azure2023_code.csv.gz", 8_819, 2048, 28, 2.57),
        ("mooncake_conversation.jsonl.gz", 12_031, 12_035, 343, 3.40),
        ("servegen_deepseek-r1_1800s_20rps.csv.gz", 35_996, 1015, 782, 20.0),
    ],
)
def test_published_statistics_come_out(
    name: str, rows: int, prompt_mean: int, output_mean: int, rps: float
) -> None:
    if not (SHARED / name).exists():
        pytest.skip("the trace files are not here")
    workload = load_trace(SHARED / name)
    assert len(workload) == rows
    assert round(workload.mean_prompt_tokens) == prompt_mean
    assert round(workload.mean_output_tokens) == output_mean
    assert workload.native_rps == pytest.approx(rps, abs=0.005)
