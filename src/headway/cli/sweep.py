"""Decides what `headway sweep` takes and shows: topologies that GPUs can be made into, and which are best.

The same is a call in Python (`headway.sweep`); this file reads options, shows progress and prints what came
back.
"""

from itertools import groupby
from pathlib import Path
from typing import Annotated

from rich.markup import escape

import headway
from headway.cli import simulate
from headway.cli.console import Bar, friendly, option, stdout
from headway.cli.simulate import (
    Address,
    Arrivals,
    Backend,
    HtmlFile,
    JsonFile,
    OutFile,
    Requests,
    Resume,
    Seed,
    Seeds,
    SloTpot,
    SloTtft,
    Trace,
    Workers,
    WorkloadName,
)
from headway.core.errors import ConfigError

_TOPOLOGY = "Which topologies"
_LIST = "A,B,…"


@friendly
def sweep(
    trace: Trace = None,
    workload: WorkloadName = None,
    system: Annotated[str, option("GPUs: h100, h200, or both.", _TOPOLOGY, metavar=_LIST)] = "h200",
    gpus: Annotated[
        int | None,
        option(
            "Most GPUs of a topology; a P:D ratio is repeated as often as they allow "
            "[dim](default: each ratio once)[/].",
            _TOPOLOGY,
            metavar="N",
        ),
    ] = None,
    ep: Annotated[
        str, option("EP sizes of prefill and of decode, tried in all pairs.", _TOPOLOGY, metavar=_LIST)
    ] = "8,16,32",
    prefill_ep: Annotated[
        str | None, option("EP sizes of prefill alone [dim](default: --ep)[/].", _TOPOLOGY, metavar=_LIST)
    ] = None,
    decode_ep: Annotated[
        str | None, option("EP sizes of decode alone [dim](default: --ep)[/].", _TOPOLOGY, metavar=_LIST)
    ] = None,
    pd: Annotated[str, option("Prefill to decode instances.", _TOPOLOGY, metavar="P:D,…")] = "1:1,2:1,3:1",
    chunk: Annotated[
        str, option("Most tokens of a prefill pass, per rank.", _TOPOLOGY, metavar=_LIST)
    ] = "4096",
    policy: Annotated[
        str,
        option("Cluster policies, as for compare.", simulate.POLICY, "--policy", "--policies", metavar=_LIST),
    ] = "staggered",
    batch: Annotated[
        str, option("Batch policies of the engines.", simulate.POLICY, metavar=_LIST)
    ] = "vllm-v1",
    load: Annotated[
        str | None,
        option(
            "Fractions of each topology's own nominal capacity [dim](default: 0.2,0.4,0.6,0.8,1)[/].",
            simulate.LOAD,
            metavar="X,Y,…",
        ),
    ] = None,
    rps: Annotated[
        str | None,
        option("Requests per second, the same for all, instead of load.", simulate.LOAD, metavar="X,Y,…"),
    ] = None,
    arrivals: Arrivals = None,
    requests: Requests = None,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    latency: Annotated[
        str,
        option(
            "What the front weighs against goodput per GPU: ttft, tpot or e2e, with -mean, -p50, -p90, -p95, "
            "-p99 or -max.",
            simulate.TARGET,
            metavar="NAME",
        ),
    ] = "ttft-p99",
    attainment: Annotated[
        float,
        option(
            "Share of requests in both SLOs that the front asks for.",
            simulate.TARGET,
            metavar="SHARE",
        ),
    ] = 0.9,
    seed: Seed = 0,
    seeds: Seeds = 1,
    workers: Workers = None,
    backend: Backend = "processes",
    address: Address = None,
    out: OutFile = None,
    resume: Resume = False,
    json: JsonFile = None,
    html: HtmlFile = None,
    png: Annotated[Path | None, option("The figure alone.", simulate.OUT, metavar="FILE")] = None,
) -> None:
    """Explore topologies for a workload and its targets: goodput per GPU against latency.

    DeepSeek-V3 with prefill and decode apart, on measured step times. What does not fit (memory, GPUs,
    nothing measured) is left out and said to be. The [italic]Pareto front[/] holds the points that no other
    beats in both.

    [bold]Examples[/]

    The best use of 64 H200, at conversation lengths:
    [cyan]headway sweep --workload azure-conv --gpus 64 --requests 3000 --html sweep.html[/]

    Your trace and targets; interrupted or killed, the same line goes on where it was:
    [cyan]headway sweep --trace mine.csv.gz --gpus 64 --ep 8,16,32 --pd 1:1,2:1,3:1 --chunk 2048,4096
    --policy staggered --ttft 2 --tpot 0.05 --seeds 2 --out sweep.jsonl --resume[/]

    On a Ray cluster:
    [cyan]headway sweep --gpus 128 --ep 8,16,32,64 --backend ray --address head:6379 --out sweep.parquet[/]
    """
    from headway.report import figures
    from headway.report.html import write_sweep

    simulate.check_writable(json, html, png, out)
    bar = Bar("simulations")
    with simulate.saying_what_is_kept(out, bar), bar:
        result = headway.sweep(
            trace=trace,
            workload=workload,
            system=simulate.names(system) or [],
            gpus=gpus,
            ep=_whole("--ep", ep) or [],
            prefill_ep=_whole("--prefill-ep", prefill_ep),
            decode_ep=_whole("--decode-ep", decode_ep),
            pd=simulate.names(pd) or [],
            chunk=_whole("--chunk", chunk) or [],
            policies=simulate.names(policy) or [],
            batch=simulate.names(batch) or [],
            load=simulate.numbers("--load", load),
            rps=simulate.numbers("--rps", rps),
            arrivals=arrivals,
            requests=requests,
            seed=seed,
            seeds=seeds,
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            latency=latency,
            attainment=attainment,
            workers=workers,
            backend=backend,
            address=address,
            out=out,
            resume=resume,
            progress=bar,
        )
    _show(result)
    if json:
        json.write_text(result.to_json(), encoding="utf-8")
    if html:
        write_sweep(html, result, title="Headway: topologies")
    if png:
        figures.to_png(figures.goodput_against_latency(result), png)
    simulate.say_written(out, json, html, png)


def _whole(flag: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in simulate.names(text) or []]
    except ValueError as error:
        wrong = str(error).rpartition(": ")[2]
        raise ConfigError(f"{flag}: {wrong} is not a whole number; write 8,16") from None


def _show(result: headway.SweepResult) -> None:
    from headway.report.tables import front_grid, sweep_headlines, to_rich

    out = stdout()
    out.print(simulate.about("DeepSeek-V3", result.workload, result.provenance))
    grid = front_grid(result)
    if grid.rows:
        out.print(to_rich(grid, width=out.width))
    for line in sweep_headlines(result):
        out.print(f"• {escape(line)}")
    for run in result.failed:
        out.print(f"[red]failed: {escape(run.name)}: {escape(run.why)}[/]", soft_wrap=True)
    for why, topologies in groupby(sorted(result.refused, key=lambda r: r.why), key=lambda r: r.why):
        names = ", ".join(refusal.topology.name for refusal in topologies)
        out.print(f"[dim]left out: {escape(why)}: {escape(names)}[/]", soft_wrap=True)
