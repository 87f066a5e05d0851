"""Azure LLM inference traces, 2023 and 2024 (github.com/Azure/AzurePublicDataset, CC-BY-4.0).

TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10             2023: seven decimals, no zone
2024-05-10 00:00:00.009930+00:00,2162,5         2024: six, with a zone
"""

from datetime import UTC, datetime, timedelta

from headway.workload.traces.reading import csv_format

__all__ = ["FORMAT"]

EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def _timestamp_s(text: str, column: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{column} must be like 2023-11-16 18:17:03.97, got {text!r}") from None
    # Never the machine's own zone: two machines would read two traces.
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (zoned - EPOCH).total_seconds()


FORMAT = csv_format(
    "Azure",
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    time_s=_timestamp_s,
)
