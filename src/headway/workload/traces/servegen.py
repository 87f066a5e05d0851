"""ServeGen workloads saved as CSV (github.com/alibaba/ServeGen, arXiv 2505.09999, Apache-2.0).

    timestamp,input_tokens,output_tokens,reason_tokens
    0.0037,355,375,0

Times are seconds. ServeGen draws reasoning as a ratio of the output, so `reason_tokens` are a part of
`output_tokens` and not added to them; the column may be absent.
"""

from headway.workload.traces.reading import csv_format, seconds

__all__ = ["FORMAT"]

FORMAT = csv_format(
    "ServeGen",
    "timestamp,input_tokens,output_tokens,reason_tokens",
    ("timestamp", "input_tokens", "output_tokens"),
    time_s=seconds,
)
