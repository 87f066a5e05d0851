"""Decides what the offline commands take and show: compare, capacity, policies, presets, calibrate, demo.

Everything here is a few lines of Python too (`headway.compare`, `headway.capacity`); this file reads options,
shows progress and prints what came back.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

import headway
from headway.cli.console import Bar, friendly, option, plain_table, stderr, stdout
from headway.core.errors import ConfigError, HeadwayError, unknown_name

if TYPE_CHECKING:
    from headway.report.results import Provenance

INPUT, POLICY, LOAD, TARGET, RUN, OUT = (
    "What is served",
    "Who decides",
    "How hard",
    "Targets",
    "How it is run",
    "What is written",
)


Trace = Annotated[
    Path | None,
    option(
        "A recorded trace: Azure, Mooncake, Bailian, BurstGPT or ServeGen, plain or .gz.",
        INPUT,
        metavar="FILE",
    ),
]
WorkloadName = Annotated[
    str | None,
    option("A fitted workload, when there is no trace [dim](default: azure-code)[/].", INPUT, metavar="NAME"),
]
Cluster = Annotated[
    str, option("A preset (see headway presets) or a .toml file.", INPUT, metavar="PRESET|FILE")
]
Policies = Annotated[
    str | None,
    option(
        "Cluster policies, each prefill or prefill+decode; settings as name:setting=value. "
        "[dim](default: ours and two baselines)[/]",
        POLICY,
        metavar="A,B,…",
    ),
]
Batch = Annotated[
    str | None,
    option(
        "Batch policies of the engines, each run with every policy "
        "[dim](default: what suits the cluster; on one engine, those to compare)[/].",
        POLICY,
        metavar="A,B,…",
    ),
]
Arrivals = Annotated[
    str | None,
    option(
        "recorded, poisson or gamma:CV [dim](default: recorded for a trace, poisson else)[/].",
        LOAD,
        metavar="HOW",
    ),
]
Requests = Annotated[
    int | None, option("Requests per simulation [dim](default: the whole trace)[/].", LOAD, metavar="N")
]
Seed = Annotated[int, option("First seed; equal seeds see equal requests.", RUN, metavar="S")]
Seeds = Annotated[int, option("How many seeds; with two or more, 95% intervals are shown.", RUN, metavar="N")]
SloTtft = Annotated[
    float | None,
    option(
        "Time to first token, in seconds [dim](default: the cluster's)[/].",
        TARGET,
        "--slo-ttft",
        "--ttft",
        metavar="S",
    ),
]
SloTpot = Annotated[
    float | None,
    option(
        "Mean time per token after the first, in seconds [dim](default: the cluster's)[/].",
        TARGET,
        "--slo-tpot",
        "--tpot",
        metavar="S",
    ),
]
Workers = Annotated[
    int | None,
    option(
        "How many at a time [dim](default: one per core)[/].",
        RUN,
        metavar="N",
    ),
]
Backend = Annotated[
    str,
    option("processes of this machine, or ray [dim](pip install 'headway\\[ray]')[/].", RUN, metavar="NAME"),
]
Address = Annotated[
    str | None,
    option(
        "The Ray cluster: HOST:PORT, ray://HOST:PORT or auto "
        "[dim](default: RAY_ADDRESS, or else a Ray on this machine)[/].",
        RUN,
        metavar="ADDRESS",
    ),
]
OutFile = Annotated[
    Path | None,
    option(
        "Each result as it comes: FILE.jsonl, or FILE.parquet at the end with FILE.jsonl beside it.",
        OUT,
        "--out",
        metavar="FILE",
    ),
]
Resume = Annotated[bool, option("Go on with --out: what it holds is not run again.", OUT, "--resume")]
JsonFile = Annotated[Path | None, option("All figures as JSON.", OUT, "--json", metavar="FILE")]
HtmlFile = Annotated[Path | None, option("A self-contained report.", OUT, "--html", metavar="FILE")]
TimelineFile = Annotated[
    Path | None,
    option("The passes of every rank, for ui.perfetto.dev.", OUT, "--timeline", metavar="FILE"),
]
Attainment = Annotated[float, option("Share of requests that must be in time.", TARGET, metavar="SHARE")]
Metric = Annotated[
    str,
    option(
        "slo: TTFT and mean TPOT. envelope: FairBatching's deadline of each token.", TARGET, metavar="NAME"
    ),
]


@friendly
def compare(
    trace: Trace = None,
    workload: WorkloadName = None,
    cluster: Cluster = "dsv3-h200-pd",
    policies: Policies = None,
    batch: Batch = None,
    load: Annotated[
        str | None,
        option("Fractions of nominal capacity [dim](default: 0.2,0.4,0.6,0.8,1)[/].", LOAD, metavar="X,Y,…"),
    ] = None,
    rps: Annotated[str | None, option("Requests per second, instead of load.", LOAD, metavar="X,Y,…")] = None,
    arrivals: Arrivals = None,
    requests: Requests = None,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    workers: Workers = None,
    backend: Backend = "processes",
    address: Address = None,
    out: OutFile = None,
    resume: Resume = False,
    json: JsonFile = None,
    html: HtmlFile = None,
    timeline: TimelineFile = None,
) -> None:
    """Simulate policies side by side, and show what each does to latency.

    Load 1 is [italic]nominal capacity[/]: the rate at which the tighter pool would run full with all its
    ranks equal.

    [bold]Examples[/]

    The shipped policies on DeepSeek-V3, prefill and decode apart:
    [cyan]headway compare --requests 3000[/]

    Your trace, your loads, a report to open in a browser:
    [cyan]headway compare --trace azure2023_code.csv.gz --load 0.5,0.8 --html report.html[/]

    Batch policies of one dense engine, settings after a colon, three seeds:
    [cyan]headway compare --cluster llama8b-h100 --batch fair,triage,stall-free:token_budget=2048 --seeds 3[/]

    A policy of your own against a baseline:
    [cyan]headway compare --policies my_module:Patient:hold_s=0.1,least-tokens[/]
    """
    from headway.report.html import write as write_html
    from headway.report.timeline import write_perfetto

    check_writable(json, html, timeline, out)
    with Bar("simulations") as bar, saying_what_is_kept(out, bar):
        result = headway.compare(
            trace=trace,
            workload=workload,
            cluster=cluster,
            policies=names(policies),
            batch=names(batch),
            load=numbers("--load", load),
            rps=numbers("--rps", rps),
            arrivals=arrivals,
            requests=requests,
            seed=seed,
            seeds=seeds,
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            workers=workers,
            backend=backend,
            address=address,
            out=out,
            resume=resume,
            progress=bar,
            timeline=html is not None or timeline is not None,
        )
    _show_comparison(result)
    if json:
        json.write_text(result.to_json(), encoding="utf-8")
    if html:
        write_html(html, [result], title="Headway: policies compared")
    if timeline:
        write_perfetto(result.timelines, timeline)
    say_written(out, json, html, timeline)


@friendly
def capacity(
    trace: Trace = None,
    workload: WorkloadName = None,
    cluster: Cluster = "llama8b-h100",
    policies: Policies = None,
    batch: Batch = None,
    attainment: Attainment = 0.99,
    metric: Metric = "slo",
    tolerance: Annotated[
        float, option("Stop when the rate is known this well.", RUN, metavar="SHARE")
    ] = 0.02,
    arrivals: Arrivals = None,
    requests: Requests = None,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    seed: Seed = 0,
    seeds: Seeds = 3,
    workers: Workers = None,
    backend: Backend = "processes",
    address: Address = None,
    out: OutFile = None,
    resume: Resume = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Search the highest rate at which requests meet their targets, for each policy.

    Each seed is searched on its own (doubling, then bisection); shown are the mean and its 95% interval.

    [bold]Examples[/]

    FairBatching and triage against Sarathi on one dense engine:
    [cyan]headway capacity --cluster llama8b-h100 --requests 2000[/]

    Routing over four engines, nine requests in ten:
    [cyan]headway capacity --cluster llama8b-h100-x4 --policies pab,round-robin --attainment 0.9[/]
    """
    from headway.report.html import write as write_html

    check_writable(json, html, out)
    with Bar("searches") as bar, saying_what_is_kept(out, bar):
        result = headway.capacity(
            trace=trace,
            workload=workload,
            cluster=cluster,
            policies=names(policies),
            batch=names(batch),
            attainment=attainment,
            metric=metric,  # type: ignore[arg-type]  # checked by capacity itself
            tolerance=tolerance,
            arrivals=arrivals,
            requests=requests,
            seed=seed,
            seeds=seeds,
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            workers=workers,
            backend=backend,
            address=address,
            out=out,
            resume=resume,
            progress=bar,
        )
    _show_capacity(result)
    if json:
        json.write_text(result.to_json(), encoding="utf-8")
    if html:
        write_html(html, [], [result], title="Headway: capacity")
    say_written(out, json, html)


@friendly
def policies(
    name: Annotated[
        str | None, typer.Argument(help="A policy: its settings and its card.", metavar="[NAME]")
    ] = None,
) -> None:
    """List the policies there are, or explain one: settings with units and defaults, and its card.

    [bold]Examples[/]

    [cyan]headway policies[/]

    [cyan]headway policies staggered[/]

    A setting is given after a colon, wherever a policy is named:
    [cyan]headway compare --policies staggered:max_hold_s=30,least-tokens[/]
    """
    from headway.core.batch import batch_policies
    from headway.core.cluster import cluster_policies

    families = {"cluster policies": cluster_policies, "batch policies": batch_policies}
    if name is None:
        for title, registry in families.items():
            stdout().print(_policy_table(title, {n: registry.find(n)[0] for n in registry.names()}))
        stdout().print("[dim]One of them in full: headway policies NAME[/]")
        return
    found = {title: registry for title, registry in families.items() if name in registry.names()}
    if not found:
        known = [n for registry in families.values() for n in registry.names()]
        raise unknown_name("policy", name, dict.fromkeys(known))
    for title, registry in found.items():
        _show_policy(title, name, registry.find(name)[0])
    _show_card(name)


@friendly
def presets(
    name: Annotated[
        str | None, typer.Argument(help="A preset, or a .toml file, in full.", metavar="[NAME]")
    ] = None,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print it as a file that --cluster FILE.toml reads.")
    ] = False,
) -> None:
    """List the clusters that ship with Headway, or show one in full with the source of its numbers.

    A cluster of your own begins as a copy: docs/engine-model.md says what its keys mean.

    [bold]Examples[/]

    [cyan]headway presets[/]

    [cyan]headway presets dsv3-h200-pd[/]

    [cyan]headway presets dsv3-h200-pd --toml > mine.toml && headway compare --cluster mine.toml[/]
    """
    from headway.model.presets import PRESETS, load_cluster

    if name is None:
        if toml:
            raise ConfigError("--toml: say which preset: headway presets NAME --toml")
        stdout().print(_preset_table([load_cluster(preset) for preset in PRESETS]))
        return
    if toml:
        from headway.model.cluster_file import cluster_toml

        typer.echo(cluster_toml(load_cluster(name)), nl=False)
        return
    _show_preset(load_cluster(name))


@friendly
def calibrate(
    file: Annotated[Path, typer.Argument(help="Measured steps, plain or .gz CSV.", metavar="FILE.csv")],
    where: Annotated[
        str | None,
        typer.Option(help="Keep the rows whose columns contain these texts.", metavar="COLUMN=TEXT,…"),
    ] = None,
) -> None:
    """Fit the step-time model to measured steps, and say how far off it is in each regime.

    The file has a header with [bold]new_tokens, context_tokens, attention, duration_s[/] (or N, K, Q, ms),
    and may have [bold]phase[/] (prefill, decode or mixed), [bold]decodes[/] and [bold]host_gap_s[/].
    context_tokens is that of the decodes, attention is Σ chunk·(context + chunk/2) over the prompts of the
    step. vLLM with Headway's scheduler records such files (docs/vllm.md). What is printed goes into a cluster
    file as it is, at the end of its pool.

    [bold]Examples[/]

    [cyan]headway calibrate steps.csv[/]

    One engine of a table with several:
    [cyan]headway calibrate dense_steps.csv --where model=Llama-3.1-8B,system=h100,backend=vllm[/]
    """
    from headway.model.calibration import (
        errors_by_regime,
        fit_hinge,
        fit_linear,
        host_gap_s,
        jitter,
        read_steps,
        to_toml,
        without_gap,
    )

    steps = read_steps(file, _where(where))
    gap_s = host_gap_s(steps)
    steps = without_gap(steps, gap_s)
    linear, best = fit_linear(steps), fit_hinge(steps)
    forms = {
        "linear: a + b·N + c·K + q·Q": linear,
        "with knees: b0 up to n0 tokens, b1 beyond; d beyond d0 decodes": best,
    }
    for title, costs in forms.items():
        stdout().print(_error_table(title, errors_by_regime(costs, steps)))
    stdout().print("[bold]For a cluster file[/] [dim](the form with knees)[/]\n")
    print(to_toml(best, host_gap_s=gap_s, jitter=jitter(best, steps)), end="")


@friendly
def demo(
    out: Annotated[Path, typer.Option(help="Where to write.", metavar="DIR")] = Path("out"),
    trace: Trace = None,
    requests: Annotated[int, typer.Option(help="Requests per simulation.", metavar="N")] = 4000,
    workers: Workers = None,
) -> None:
    """Show in two minutes what this is about, on DeepSeek-V3 and on a dense model.

    First SBS and triage against every immediate baseline over load; then FairBatching and triage against
    Sarathi and vLLM v1. Writes DIR/report.html, DIR/demo.png and DIR/timeline.json.

    [bold]Examples[/]

    [cyan]headway demo[/]

    [cyan]headway demo --out results --trace azure2023_code.csv.gz[/]
    """
    from headway.report import figures
    from headway.report.html import write as write_html
    from headway.report.timeline import write_perfetto

    started_s = time.perf_counter()
    _make_directory(out)
    source = {"trace": trace} if trace else {"workload": "azure-code"}
    # Poisson: a recorded trace's own bursts, compressed in time, are a load of their own at every load.
    shared: dict[str, Any] = {**source, "arrivals": "poisson", "requests": requests, "workers": workers}
    results = []
    for title, options in _DEMO:
        stdout().rule(f"[bold]{title}", align="left")
        with Bar("simulations") as bar:
            results.append(headway.compare(**shared, **options, progress=bar, timeline=True))
        _show_comparison(results[-1])
    page, picture, passes = out / "report.html", out / "demo.png", out / "timeline.json"
    write_html(page, results, title="Headway: what scheduling does to latency")
    figures.to_png(figures.overview(results), picture)
    shown = ("staggered", "least-tokens")  # two are enough to see the difference, and all would be 12 MB
    write_perfetto({name: lanes for name, lanes in results[0].timelines.items() if name in shown}, passes)
    say_written(page, picture, passes)
    stdout().print(f"[dim]{time.perf_counter() - started_s:.0f} s[/]")


_BASELINES = ["least-tokens", "least-requests", "power-of-two", "vllm-dp", "round-robin", "random"]
_DEMO: list[tuple[str, dict[str, Any]]] = [
    (
        "Staggered batch scheduling: DeepSeek-V3, prefill and decode apart",
        {
            "cluster": "dsv3-h200-pd",
            "policies": ["staggered", "triage", *_BASELINES],
            "load": [0.3, 0.6, 0.8, 1.0, 1.2],
        },
    ),
    (
        "FairBatching and triage: Llama-3.1-8B, one dense engine",
        {
            "cluster": "llama8b-h100",
            "policies": ["round-robin"],
            "batch": [
                "fair",
                "triage",
                "fair:anchor=first-token",
                "stall-free:token_budget=512",
                "stall-free:token_budget=2048",
                "vllm-v1",
            ],
            "load": [0.4, 0.6, 0.8, 1.0, 1.3],
        },
    ),
]


@contextmanager
def saying_what_is_kept(out: Path | None, bar: Bar) -> Iterator[None]:
    """Where the work is cut short, say on which file it can go on."""
    try:
        yield
    except (KeyboardInterrupt, HeadwayError):
        if out is not None and bar.total:
            file = out.with_suffix(".jsonl")
            text = f"{bar.done} of {bar.total} are in {file}: --resume goes on from there"
            stderr().print(escape(text), soft_wrap=True)
        raise


def names(text: str | None) -> list[str] | None:
    """Read "a,b" as a list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str | None) -> list[float] | None:
    """Read "0.5,0.8" as a list. Raises ConfigError naming the option."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        wrong = str(error).rpartition(": ")[2]
        raise ConfigError(f"{option}: {wrong} is not a number; write 0.5,0.8") from None


def _where(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in names(text) or []]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--where: {name!r} is not column=text")
    return {name.strip(): value.strip() for name, _, value in pairs}


def check_writable(*files: Path | None) -> None:
    """Refuse an impossible output before the work rather than after it."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: there is no directory {str(file.parent)!r}")
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a directory")
        if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ConfigError(f"{file}: no permission to write")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def say_written(*files: Path | None) -> None:
    """Say which files there are now."""
    for file in files:
        if file is not None:
            stdout().print(f"wrote [bold]{escape(str(file))}[/]", soft_wrap=True)


def _show_comparison(result: headway.Comparison) -> None:
    from headway.report.tables import compare_grids, headlines, to_rich

    out = stdout()
    out.print(about(result.cluster, result.workload, result.provenance))
    for grid in compare_grids(result):
        out.print(to_rich(grid, width=out.width))
    for line in headlines(result):
        out.print(f"• {escape(line)}")


def _show_capacity(result: headway.CapacityResult) -> None:
    from headway.report.tables import capacity_grid, to_rich

    out = stdout()
    out.print(about(result.cluster, result.workload, result.provenance))
    out.print(to_rich(capacity_grid(result), width=out.width))


def about(cluster: str, workload: str, basis: "Provenance") -> str:
    """What results rest on, in two lines."""
    seeds = (
        f"seed {basis.seeds[0]}"
        if len(basis.seeds) == 1
        else f"seeds {basis.seeds[0]}–{basis.seeds[-1]}, ± 95%"
    )
    fixed = basis.arrivals == "recorded" and len(basis.seeds) > 1
    note = (
        "\n[yellow]recorded arrivals are the same for every seed: ± covers jitter and chance only[/]"
        if fixed
        else ""
    )
    nominal = "" if math.isnan(basis.nominal_rps) else f"nominal capacity {basis.nominal_rps:.3g} req/s · "
    return (
        f"[bold]{escape(cluster)}[/] · [bold]{escape(workload)}[/] "
        f"({basis.mean_prompt_tokens:.0f} + {basis.mean_output_tokens:.0f} tokens) · "
        f"{escape(basis.arrivals)} arrivals · {basis.requests:,} requests · {seeds}\n"
        f"[dim]{nominal}targets: TTFT {basis.slo_ttft_s:g} s, "
        f"TPOT {1e3 * basis.slo_tpot_s:g} ms[/]{note}"
    )


def _policy_table(title: str, classes: dict[str, Any]) -> Table:
    table = plain_table(title, "name", "what it does", "settings")
    for name, cls in classes.items():
        settings = ", ".join(doc.name for doc in cls.Settings.docs())
        table.add_row(f"[cyan]{name}[/]", escape(cls.summary), f"[dim]{settings or '–'}[/]")
    return table


def _show_policy(title: str, name: str, cls: Any) -> None:
    out = stdout()
    out.print(f"[bold cyan]{name}[/] [dim]({title[:-3]}y)[/]: {escape(cls.summary)}")
    if getattr(cls, "partner", None):
        out.print(f"with prefill and decode apart it takes [cyan]{cls.partner}[/] for the decode pool")
    table = plain_table("settings", "name", "default", "unit", "meaning")
    for doc in cls.Settings.docs():
        table.add_row(
            doc.name,
            str(doc.default).lower() if isinstance(doc.default, bool | None) else str(doc.default),
            doc.unit,
            escape(doc.doc),
        )
    if table.row_count:
        out.print(table)


def _show_card(name: str) -> None:
    """The one-page card: beside the package where it is installed, under docs/ in a checkout."""
    package = Path(headway.__file__).parent
    for home in (package / "cards", package.parents[1] / "docs" / "policies"):
        # One name may be a cluster policy and a batch policy, with a card each.
        for card in (home / f"{name}.md", home / f"{name}-batch.md"):
            if card.is_file():
                stdout().print(Markdown(card.read_text(encoding="utf-8")))
        if home.is_dir():
            return


def _preset_table(clusters: list[Any]) -> Table:
    table = plain_table("clusters", "name", "engines", "ranks", "TTFT", "TPOT")
    for cluster in clusters:
        engines = " + ".join(f"{pool.instances} {pool.role}" for pool in cluster.pools)
        ranks = " + ".join(f"{pool.instances}×{pool.ranks}" for pool in cluster.pools)
        slo = cluster.slo
        table.add_row(
            f"[cyan]{cluster.name}[/]", engines, ranks, f"{slo.ttft_s:g} s", f"{1e3 * slo.tpot_s:g} ms"
        )
    return table


def _show_preset(cluster: Any) -> None:
    out = stdout()
    out.print(f"[bold cyan]{cluster.name}[/]: {escape(cluster.source)}")
    network = cluster.network
    out.print(
        f"targets: TTFT {cluster.slo.ttft_s:g} s, TPOT {1e3 * cluster.slo.tpot_s:g} ms · "
        f"KV {cluster.kv_bytes_per_token:,.0f} bytes per token\n"
        f"network: dispatch {1e3 * network.dispatch_latency_s:g} ms, "
        f"report {1e3 * network.report_latency_s:g} ms, answer {1e3 * network.answer_latency_s:g} ms, "
        f"KV {network.kv_bandwidth_bytes_s / 1e9:g} GB/s after {1e3 * network.kv_latency_s:g} ms"
    )
    pools = cluster.pools
    table = plain_table("pools", "", *(str(pool.role) for pool in pools))
    for name in (n for n in type(pools[0]).model_fields if n not in ("role", "costs", "memory")):
        table.add_row(name, *(str(getattr(pool, name)) for pool in pools))
    out.print(table)
    for pool in pools:
        out.print(f"[bold]step time, {pool.role}[/] ({pool.costs.form})")
        for line in _cost_lines(pool.costs):
            out.print(f"  {line}", style="dim")


def _cost_lines(costs: Any) -> list[str]:
    """Coefficients that are not 0, a line per kind of pass."""
    if costs.form == "dense":
        return [_coefficients(costs)]
    return [f"{kind}: {_coefficients(getattr(costs, kind))}" for kind in ("prefill", "decode")]


def _coefficients(costs: Any) -> str:
    values = {field.name: getattr(costs, field.name) for field in dataclasses.fields(costs)}
    return ", ".join(
        f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float) and value
    )


def _error_table(title: str, errors: Any) -> Table:
    table = plain_table(title, "regime", "steps", "bias", "mean error", "95% of steps within", "worst")
    for error in errors:
        shares = (f"{100 * share:.1f}%" for share in (error.mean, error.p95, error.worst))
        table.add_row(error.regime, str(error.steps), f"{100 * error.bias:+.1f}%", *shares)
    return table
