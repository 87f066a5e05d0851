"""BurstGPT (github.com/HPMLL/BurstGPT, arXiv 2401.17644, CC-BY-4.0): ChatGPT and GPT-4 requests over months.

    Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
    5,ChatGPT,472,18,490,Conversation log
    1106,ChatGPT,0,0,0,Conversation log             0 response tokens: the request failed; skipped and counted

Times are seconds. Release 2 has two more columns; like the model, they are not used.
"""

from headway.workload.traces.reading import csv_format, seconds

__all__ = ["FORMAT"]

FORMAT = csv_format(
    "BurstGPT",
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    ("Timestamp", "Request tokens", "Response tokens"),
    time_s=seconds,
    zero_means_failed=True,
)
