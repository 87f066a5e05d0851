// Draws what /admin/live tells, about four times a second. What the gateway says is data, never markup: all text goes
// in by textContent. Schema of the data: docs/operations.md, "The page".
"use strict";

const HISTORY_S = 60;
const MOST_DECISIONS = 400, SHOWN_DECISIONS = 80;
const RETRY_S = [0.5, 1, 2, 5];
const SILENT_S = 3;

const $ = (id) => document.getElementById(id);
const model = {
  state: null, // the newest object told
  passes: new Map(), // instance -> passes of the last seconds, by end
  decisions: [], // newest last, with their time of day
  held: [], // [at_s, requests] of the last minute
  arrived: [], // [at_s, total]
  paused: false,
  heard: 0, // performance.now() of the last word
  problem: "",
};
let probed = null; // {instance, rank, pass}

// ---- text

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function put(id, text) {
  const at = typeof id === "string" ? $(id) : id;
  if (at.textContent !== text) at.textContent = text;
}

function count(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10_000) return Math.round(value).toLocaleString("en");
  return value < 1e6 ? `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)}k` : `${(value / 1e6).toFixed(1)}M`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const size = Math.abs(seconds);
  if (size < 0.0995) return `${(seconds * 1000).toFixed(1)} ms`;
  if (size < 0.9995) return `${(seconds * 1000).toFixed(0)} ms`;
  return size < 100 ? `${seconds.toFixed(size < 10 ? 2 : 1)} s` : `${Math.round(seconds)} s`;
}

const percent = (share) => (share === null || Number.isNaN(share) ? "–" : `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)}%`);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// ---- taking in

function takeIn(told) {
  model.state = told;
  model.heard = performance.now();
  model.problem = "";
  const wall = Date.now() / 1000 - told.now_s;
  for (const pass of told.passes) {
    if (!model.passes.has(pass.instance)) model.passes.set(pass.instance, []);
    model.passes.get(pass.instance).push(pass);
  }
  const since = told.now_s - told.lanes_s - 1;
  const names = new Set(told.workers.map((worker) => worker.name));
  for (const [name, passes] of model.passes) {
    const kept = passes.findIndex((pass) => pass.end_s > since);
    passes.splice(0, kept < 0 ? passes.length : kept);
    if (!names.has(name)) model.passes.delete(name);
  }
  for (const decision of told.decisions) model.decisions.push({ ...decision, wall_s: decision.at + wall });
  model.decisions.splice(0, model.decisions.length - MOST_DECISIONS);
  remember(model.held, told.now_s, told.held.requests);
  remember(model.arrived, told.now_s, told.totals.arrived);
}

function remember(history, now, value) {
  if (history.length && now < history[history.length - 1][0]) history.length = 0; // another gateway
  history.push([now, value]);
  while (history[0][0] < now - HISTORY_S) history.shift();
}

// ---- the tiles

function drawFigures(state) {
  put("policy", state.policy);
  put("in-flight", count(state.in_flight));
  for (const name of ["served", "refused", "client_errors", "failed"]) put(name, count(state.totals[name]));
  const recent = model.arrived.filter(([at]) => at > state.now_s - 5);
  const [first, last] = [recent[0], recent[recent.length - 1]];
  put("arrived-rate", recent.length > 1 ? ((last[1] - first[1]) / (last[0] - first[0])).toFixed(1) : "–");
}

function drawLatency(id, summary, window_s) {
  const at = $(id).querySelector(".latency");
  const target = summary.target_s;
  const ranks = ["p50", "p90", "p99"].map((name) => [name, summary[`${name}_s`]]);
  const most = Math.max(1.5 * target, 1.05 * (summary.p99_s ?? 0));
  const list = element("dl");
  const scale = element("div", { className: "scale" });
  scale.setAttribute("aria-hidden", "true");
  for (const [name, value] of ranks) {
    const over = value !== null && value > target ? "over" : "";
    list.append(element("div", {}, element("dt", { textContent: name }), element("dd", { className: over, textContent: duration(value), data: { of: name } })));
    if (value !== null) {
      const mark = element("i", { className: `mark ${over}` });
      mark.style.left = `${(100 * value) / most}%`;
      scale.append(mark);
    }
  }
  const line = element("i", { className: "target" });
  line.style.left = `${(100 * target) / most}%`;
  const within = element("i", { className: "within" });
  within.style.width = `${(100 * Math.min(summary.p90_s ?? 0, most)) / most}%`;
  scale.prepend(within);
  scale.append(line);
  const note = summary.requests
    ? `${percent(summary.met)} of ${count(summary.requests)} within target, ${duration(target)}`
    : `no stream ended in ${window_s} s; target ${duration(target)}`;
  at.replaceChildren(list, scale, element("p", { className: "note", textContent: note }));
}

function drawBuffer(state) {
  const held = state.held;
  put("held-requests", count(held.requests));
  const most = Math.max(4, ...model.held.map(([, value]) => value));
  const points = model.held.map(([at, value]) => `${(240 * (1 - (state.now_s - at) / HISTORY_S)).toFixed(1)},${(38 - (36 * value) / most).toFixed(1)}`);
  const spark = $("held-spark");
  spark.setAttribute("aria-label", `Held requests over the last ${HISTORY_S} s, at most ${most}`);
  spark.querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  spark.querySelector(".area").setAttribute("d", `M${points[0].split(",")[0]},40L${points.join("L")}L240,40Z`);
  const fullest = Math.max(...["requests", "tokens", "bytes"].map((what) => held[what] / held.limits[what]));
  put("held-note", `${count(held.tokens)} prompt tokens, ${percent(fullest)} of its bounds`);
}

function utilisation(worker) {
  let used = 0, offered = 0;
  for (const pass of model.passes.get(worker.name) ?? []) {
    const ran = sum(pass.ran_tokens);
    if (ran) [used, offered] = [used + ran, offered + pass.ran_tokens.length * worker.chunk_tokens];
  }
  return [used, offered];
}

function drawChunk(state) {
  const takers = state.workers.filter((worker) => worker.role !== "decode");
  const parts = takers.map((worker) => [worker, ...utilisation(worker)]);
  const offered = sum(parts.map((part) => part[2]));
  put("chunk-all", offered ? percent(sum(parts.map((part) => part[1])) / offered) : "–");
  $("chunk-bars").replaceChildren(...parts.map(([worker, used, of]) => {
    const fill = element("i");
    fill.style.width = `${of ? (100 * used) / of : 0}%`;
    return element("li", { data: { worker: worker.name } }, worker.name, element("span", { className: "bar" }, fill), element("b", { textContent: of ? percent(used / of) : "–" }));
  }));
  reachIfItScrolls($("chunk-bars"), "Chunk utilisation of each engine");
}

// A list that scrolls can be reached by keyboard, one that does not is passed over.
function reachIfItScrolls(list, label) {
  if (list.scrollHeight <= list.clientHeight) for (const name of ["tabindex", "aria-label"]) list.removeAttribute(name);
  else if (!list.hasAttribute("tabindex")) {
    list.setAttribute("tabindex", "0");
    list.setAttribute("aria-label", label);
  }
}

// ---- health

function health(worker) {
  return worker.state === "up" && worker.draining ? "draining" : worker.state;
}

function whole(worker, field) {
  const told = worker.load.map((load) => load[field]).filter((values) => values !== null);
  return told.length ? told.flat() : null;
}

function kvShare(worker) {
  const blocks = whole(worker, "kv_blocks");
  return blocks && worker.kv_blocks ? sum(blocks) / (worker.kv_blocks * blocks.length) : null;
}

function total(worker, field) {
  const values = whole(worker, field);
  return values ? count(sum(values)) : "–";
}

// Why it is not ready: another replica leads the pool, or nobody does; or a role has no engine.
function notReady(state) {
  if (state.ready) return "";
  const leader = state.leader;
  return leader && !leader.leads ? `: this replica does not lead ${leader.pool}: ${leader.why}` : ": the gateway is not ready";
}

function drawWorkers(state) {
  const rows = state.workers.map((worker) => {
    const is = health(worker);
    const why = is === "up" ? "" : worker.why;
    const what = element("td", {}, element("span", { className: "state", textContent: is }));
    if (why) what.append(" ", element("span", { className: "why", textContent: why }));
    if (worker.ejections) what.append(element("span", { className: "why", textContent: ` · ejected ${worker.ejections}×` }));
    const kv = kvShare(worker);
    return element("tr", { data: { health: is, worker: worker.name } },
      element("td", {}, element("span", { className: "dot" }), ` ${worker.name} `, element("span", { className: "why", textContent: `${worker.role} · ${worker.ranks} rank${worker.ranks > 1 ? "s" : ""}` })),
      what,
      element("td", { className: "num", textContent: count(worker.legs) }),
      element("td", { className: "num optional", textContent: total(worker, "queued_tokens") }),
      element("td", { className: "num optional", textContent: total(worker, "running") }),
      element("td", { className: "num", textContent: kv === null ? "–" : percent(kv) }));
  });
  $("worker-rows").replaceChildren(...rows);
  const able = state.workers.filter((worker) => worker.takes_work).length;
  const note = `${able} of ${state.workers.length} take work${notReady(state)}`;
  put("workers-note", note);
}

// ---- lanes

function laneHeight(ranks) {
  return ranks <= 1 ? 26 : ranks <= 4 ? 14 : ranks <= 16 ? 9 : Math.max(1, Math.min(5, Math.floor(320 / ranks)));
}

// The ranks named beside a lane of many: the first, the last, and round numbers between them.
function rankTicks(ranks) {
  if (ranks <= 8) return [];
  const most = Math.min(9, Math.max(3, Math.floor((ranks * laneHeight(ranks)) / 36) + 1));
  return Array.from({ length: most }, (_, n) => Math.round((n * (ranks - 1)) / (most - 1)));
}

function laneOf(worker) {
  let lane = $("lanes").querySelector(`[data-lane="${CSS.escape(worker.name)}"]`);
  if (lane && lane.dataset.ranks === String(worker.ranks)) return lane;
  const canvas = element("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-describedby", "probe");
  canvas.addEventListener("mousemove", (event) => probeAt(worker.name, canvas, event));
  canvas.addEventListener("mouseleave", () => probe(null));
  canvas.addEventListener("keydown", (event) => probeByKey(worker.name, event));
  canvas.addEventListener("focus", () => probeByKey(worker.name, null));
  canvas.addEventListener("blur", () => probe(null));
  lane = element("div", { className: "lane", data: { lane: worker.name, ranks: worker.ranks } },
    element("div", {}, element("h3", {}, element("span", { className: "dot" }), element("span", { textContent: worker.name })), element("p")),
    element("div", { className: "plot" }, canvas));
  const ticks = rankTicks(worker.ranks);
  if (ticks.length) {
    const ranks = element("div", { className: "ranks" }, ...ticks.map((rank) => element("span", { textContent: rank })));
    ranks.setAttribute("aria-hidden", "true");
    lane.classList.add("ranked");
    lane.lastChild.prepend(ranks);
  }
  return lane;
}

function drawLanes(state) {
  const at = $("lanes");
  const order = { prefill: 0, aggregated: 1, decode: 2 };
  const workers = [...state.workers].sort((a, b) => order[a.role] - order[b.role]);
  const lanes = workers.map(laneOf);
  if (lanes.length !== at.children.length || lanes.some((lane, n) => at.children[n] !== lane)) at.replaceChildren(...lanes);
  if (!lanes.length) at.replaceChildren(element("p", { className: "empty", textContent: "There is no worker." }));
  const colours = getComputedStyle(document.documentElement);
  const colour = (name) => colours.getPropertyValue(`--${name}`).trim();
  const palette = Object.fromEntries(["track", "bubble", "prefill", "decode", "bad", "surface", "ink"].map((name) => [name, colour(name)]));
  workers.forEach((worker, n) => drawLane(lanes[n], worker, state, palette));
  if (!$("ticks").children.length) {
    for (let ago = state.lanes_s; ago >= 0; ago -= 2) $("ticks").append(element("span", { textContent: ago ? `−${ago} s` : "now" }));
  }
}

function drawLane(lane, worker, state, palette) {
  const passes = (model.passes.get(worker.name) ?? []).filter((pass) => pass.end_s > state.now_s - state.lanes_s);
  const is = health(worker);
  lane.dataset.health = is;
  lane.dataset.passes = passes.length;
  put(lane.querySelector("p"), caption(worker, passes, is));
  const canvas = lane.querySelector("canvas");
  canvas.setAttribute("aria-label", `${worker.name}: ${passes.length} passes on ${worker.ranks} ranks in the last ${state.lanes_s} s. ${caption(worker, passes, is)}`);
  const row = laneHeight(worker.ranks), gap = row > 4 ? 1 : 0;
  const width = canvas.clientWidth, height = worker.ranks * (row + gap);
  const density = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  pen.fillStyle = palette.track;
  for (let rank = 0; rank < worker.ranks; rank++) pen.fillRect(0, rank * (row + gap), width, row);
  const seats = worker.max_running ?? Math.max(1, ...passes.flatMap((pass) => pass.running ?? []));
  const x = (at) => width * (1 - (state.now_s - at) / state.lanes_s);
  for (const pass of passes) {
    const left = Math.max(0, x(pass.end_s - pass.duration_s)), right = x(pass.end_s);
    const wide = Math.max(0.6, right - left - (right - left > 4 ? 1 : 0.2));
    pass.ran_tokens.forEach((ran, n) => {
      const top = (pass.first_rank + n) * (row + gap);
      const decodes = pass.running?.[n] ?? 0;
      pen.fillStyle = palette.bubble;
      pen.fillRect(left, top, wide, row);
      if (decodes && worker.role !== "prefill") {
        pen.fillStyle = palette.decode;
        pen.globalAlpha = 0.3 + 0.7 * Math.min(1, decodes / seats);
        pen.fillRect(left, top, wide, row);
        pen.globalAlpha = 1;
      }
      if (ran) {
        const tall = Math.max(1, row * Math.min(1, ran / worker.chunk_tokens));
        pen.fillStyle = palette.prefill;
        pen.fillRect(left, top + row - tall, wide, tall);
      }
      if (probed && probed.pass === pass && probed.rank === pass.first_rank + n) {
        pen.strokeStyle = palette.ink;
        pen.lineWidth = 1.5;
        pen.strokeRect(left, top, wide, row);
      }
    });
  }
  drawUnderWay(pen, worker, passes, palette, (first) => first * (row + gap), row, x, width);
  if (is === "down" || is === "ejected") {
    pen.fillStyle = palette.bad;
    pen.fillRect(width - 4, 0, 4, height);
  }
}

// What a report left to do has begun when the report was made: paler, for how full the pass is will be told at its end.
function drawUnderWay(pen, worker, passes, palette, top, row, x, width) {
  for (const load of worker.load) {
    const queued = load.queued_tokens ?? [], running = worker.role === "prefill" ? [] : (load.running ?? []);
    const last = passes.findLast((pass) => pass.first_rank === load.first_rank);
    if (!last || !sum(queued) + sum(running)) continue;
    const left = x(last.end_s) + 1, ranks = Math.max(queued.length, running.length);
    pen.globalAlpha = 0.35;
    for (let n = 0; n < ranks; n++) {
      pen.fillStyle = queued[n] ? palette.prefill : running[n] ? palette.decode : palette.bubble;
      pen.fillRect(left, top(load.first_rank + n), Math.max(0, width - left), row);
    }
    pen.globalAlpha = 1;
  }
}

function caption(worker, passes, is) {
  const parts = [];
  if (is !== "up") parts.push(is);
  if (passes.length) parts.push(`pass ${duration(sum(passes.map((pass) => pass.duration_s)) / passes.length)}`);
  const queued = whole(worker, "queued_tokens");
  if (worker.role !== "decode" && queued) parts.push(`${count(sum(queued))} queued`);
  const running = whole(worker, "running");
  if (worker.role !== "prefill" && running) parts.push(`${count(sum(running))} running`);
  const kv = kvShare(worker);
  if (worker.role !== "prefill" && kv !== null) parts.push(`KV ${percent(kv)}`);
  return parts.join(" · ") || "idle";
}

// ---- pointing at a pass

function probe(found) {
  probed = found;
  if (found === null) put("probe", "Point at a pass, or focus a lane and use the arrow keys.");
  else {
    const { pass, rank, instance } = found;
    const worker = model.state.workers.find((each) => each.name === instance);
    const n = rank - pass.first_rank;
    const parts = [`${instance} rank ${rank}: ${duration(pass.duration_s)}`];
    if (worker.role !== "decode") parts.push(`${count(pass.ran_tokens[n])} of ${count(worker.chunk_tokens)} prompt tokens`);
    if (pass.running && worker.role !== "prefill") parts.push(`${pass.running[n]} running`);
    parts.push(`ended ${duration(Math.max(0, model.state.now_s - pass.end_s))} ago`);
    put("probe", parts.join(", "));
  }
  if (model.state) drawLanes(model.state);
}

function probeAt(instance, canvas, event) {
  const state = model.state;
  const worker = state.workers.find((each) => each.name === instance);
  if (!worker) return;
  const at = state.now_s - state.lanes_s * (1 - event.offsetX / canvas.clientWidth);
  const rank = Math.min(worker.ranks - 1, Math.max(0, Math.floor((event.offsetY / canvas.clientHeight) * worker.ranks)));
  const pass = passesOf(instance, rank).find((each) => each.end_s >= at && each.end_s - each.duration_s <= at);
  probe(pass ? { instance, rank, pass } : null);
}

function passesOf(instance, rank) {
  return (model.passes.get(instance) ?? []).filter((pass) => rank >= pass.first_rank && rank < pass.first_rank + pass.ran_tokens.length);
}

function probeByKey(instance, event) {
  const worker = model.state?.workers.find((each) => each.name === instance);
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event?.key];
  if (!worker || (event && !step)) return;
  event?.preventDefault();
  const own = probed?.instance === instance ? probed : null;
  const rank = Math.min(worker.ranks - 1, Math.max(0, (own?.rank ?? 0) + (step?.[1] ?? 0)));
  const passes = passesOf(instance, rank);
  if (!passes.length) return;
  const found = own ? passes.findIndex((pass) => pass.end_s >= own.pass.end_s) : passes.length - 1;
  const next = Math.min(passes.length - 1, Math.max(0, (found < 0 ? passes.length - 1 : found) + (step?.[0] ?? 0)));
  probe({ instance, rank, pass: passes[next] });
}

// ---- tables

function drawHeld(held) {
  const reasons = Object.entries(held.reasons).map(([why, many]) => element("li", {}, element("b", { textContent: count(many) }), why));
  $("reasons").replaceChildren(...(reasons.length ? reasons : [element("li", { textContent: "nothing is held" })]));
  $("held-rows").replaceChildren(...held.oldest.map((each) =>
    element("tr", {},
      element("td", { className: "id", textContent: each.id, title: each.id }),
      element("td", { className: "num optional", textContent: count(each.prompt_tokens) }),
      element("td", { className: "num", textContent: duration(each.held_s) }),
      element("td", { className: "num" }, element("span", { className: each.left_s !== null && each.left_s < 0 ? "late" : "", textContent: duration(each.left_s) })),
      element("td", { textContent: each.why }))));
}

function drawDecisions() {
  const kind = $("kind").value;
  const shown = model.decisions.filter((each) => !kind || each.do === kind).slice(-SHOWN_DECISIONS).reverse();
  $("decision-rows").replaceChildren(...shown.map((each) => {
    const where = each.instance === undefined ? "" : each.rank === undefined ? each.instance : `${each.instance} rank ${each.rank}`;
    const after = each.retry_after_s ? ` (retry after ${duration(each.retry_after_s)})` : "";
    return element("tr", { data: { do: each.do } },
      element("td", { className: "time", textContent: timeOfDay(each.wall_s) }),
      element("td", { className: "do", textContent: each.do }),
      element("td", { className: "id optional", textContent: each.request_id ?? "", title: each.request_id ?? "" }),
      element("td", { textContent: where }),
      element("td", { title: `on ${each.on}` }, `${each.why ?? ""}${after} `));
  }));
}

function timeOfDay(wall_s) {
  const at = new Date(wall_s * 1000);
  const two = (value) => String(value).padStart(2, "0");
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}.${String(at.getMilliseconds()).padStart(3, "0")}`;
}

// ---- all of it

function draw() {
  const state = model.state;
  drawStatus();
  if (!state || model.paused) return;
  drawFigures(state);
  drawLatency("ttft", state.latency.ttft, state.latency.window_s);
  drawLatency("tpot", state.latency.tpot, state.latency.window_s);
  drawBuffer(state);
  drawChunk(state);
  drawLanes(state);
  drawHeld(state.held);
  drawWorkers(state);
  drawDecisions();
}

function drawStatus() {
  const silent = model.heard && performance.now() - model.heard > SILENT_S * 1000;
  const lost = model.problem || (silent ? "no answer" : "");
  const state = lost ? "lost" : model.paused ? "paused" : model.heard ? "live" : "connecting";
  $("status").dataset.state = state;
  put("status", lost || state);
}

// While paused nothing is taken in either, so that the lanes can be looked at; what was missed is told at the end.
const missed = [];
function setPaused(paused) {
  model.paused = paused;
  const button = $("pause");
  button.setAttribute("aria-pressed", String(paused));
  button.firstChild.textContent = paused ? "Resume " : "Pause ";
  if (!paused) missed.splice(0).forEach(takeIn);
  draw();
}

function hear(told) {
  model.heard = performance.now();
  if (!model.paused) takeIn(told);
  else {
    missed.push(told);
    if (missed.length > 4 * HISTORY_S) missed.shift();
  }
  draw();
}

// ---- listening: fetch instead of EventSource, which cannot send a token

function token() {
  if (location.hash.startsWith("#token=")) {
    sessionStorage.setItem("headway-token", decodeURIComponent(location.hash.slice(7)));
    history.replaceState(null, "", location.pathname); // not for the address bar, nor for screenshots
  }
  return sessionStorage.getItem("headway-token");
}

function askForToken(note) {
  if (note) put("token-note", note);
  $("token-dialog").showModal();
  return new Promise((resolve) => {
    $("token-dialog").addEventListener("close", () => {
      sessionStorage.setItem("headway-token", $("token").value);
      $("token").value = "";
      resolve();
    }, { once: true });
  });
}

async function listenOnce() {
  const key = token();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("admin/live", { headers, cache: "no-store" });
  if (answer.status === 401) {
    await askForToken("That token is not the gateway's.");
    return;
  }
  if (!answer.ok) throw new Error(`the gateway answers ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  model.passes.clear(); // a new listener is told everything again
  model.decisions.length = 0;
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the gateway has stopped");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event.startsWith("data: ")) hear(JSON.parse(event.slice(6)));
  }
}

async function listen() {
  let tries = 0;
  if (document.documentElement.dataset.token && !token()) await askForToken("");
  for (;;) {
    const heard = model.heard;
    try {
      await listenOnce();
    } catch (error) {
      model.problem = error instanceof TypeError ? "no connection" : error.message;
      draw();
    }
    tries = model.heard === heard ? tries + 1 : 0;
    await new Promise((resolve) => setTimeout(resolve, 1000 * RETRY_S[Math.min(tries, RETRY_S.length - 1)]));
  }
}

// ---- keys and the rest

$("pause").addEventListener("click", () => setPaused(!model.paused));
$("kind").addEventListener("change", drawDecisions);
document.addEventListener("keydown", (event) => {
  const busy = event.target.closest("button, select, input, dialog, a");
  if (event.key !== " " || busy || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  setPaused(!model.paused);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => model.state && drawLanes(model.state));
addEventListener("resize", () => model.state && drawLanes(model.state));
setInterval(drawStatus, 1000);
listen();
