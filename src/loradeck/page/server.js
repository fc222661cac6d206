/** The view of the server: what it does now and has done in the last hour, from its metrics. */

import { adapterTraffic } from "./adapter_traffic.js";
import { lineChart } from "./chart.js";
import { element, replace } from "./dom.js";
import { count, duration, number, size } from "./format.js";
import { history } from "./metrics.js";
import { runningJobs } from "./running_jobs.js";

const SPAN = 10; // seconds over which rates are taken
const MINUTE = 60;
const MOST = 240; // points of a curve
const FIRST_TOKEN = "vllm:time_to_first_token_seconds";
const TIERS = { device: "on the device", memory: "in memory" };

/** @typedef {{name: string, at: (index: number) => number}} Curve its value at a sample */

/** @param {string} name of a gauge */
const gauge = (name) => (/** @type {number} */ index) => history.valueAt(name, index);
/** @param {string} name of a counter */
const rate = (name) => (/** @type {number} */ index) => history.rate(name, SPAN, {}, index);
/** @param {number} share */
const firstToken = (share) => (/** @type {number} */ index) =>
  history.quantile(FIRST_TOKEN, share, history.since(MINUTE, index), index);
/** @param {number} value */
const percent = (value) => `${number(value * 100)} %`;

/** @type {{label: string, y: string, format: (value: number) => string, curves: Curve[]}[]} */
const CHARTS = [
  {
    label: "Tokens",
    y: "tokens/s",
    format: number,
    curves: [
      { name: "Generated", at: rate("vllm:generation_tokens_total") },
      { name: "Prompts", at: rate("vllm:prompt_tokens_total") },
    ],
  },
  {
    label: "Requests",
    y: "requests",
    format: number,
    curves: [
      { name: "Running", at: gauge("vllm:num_requests_running") },
      { name: "Waiting", at: gauge("vllm:num_requests_waiting") },
    ],
  },
  {
    label: "Time to first token, over a minute",
    y: "time",
    format: duration,
    curves: [
      { name: "Median", at: firstToken(0.5) },
      { name: "99th percentile", at: firstToken(0.99) },
    ],
  },
  {
    label: "KV cache",
    y: "in use",
    format: percent,
    curves: [{ name: "In use", at: gauge("vllm:kv_cache_usage_perc") }],
  },
  {
    label: "Memory of adapters",
    y: "bytes",
    format: size,
    curves: Object.entries(TIERS).map(([tier, name]) => ({
      name: name[0].toUpperCase() + name.slice(1),
      at: (index) => history.valueAt("loradeck_adapter_bytes", index, { tier }),
    })),
  },
];

/** @returns {import("./app.js").View} */
export function create() {
  let isShown = false;
  const state = element("p", { class: "empty" }, "Reading the metrics…");
  const figures = element("dl", { class: "figures" });
  const traffic = adapterTraffic();
  const jobs = runningJobs();
  const charts = CHARTS.map(({ label, y, format, curves }) => ({
    curves,
    ...lineChart({ label, x: "time", y, formatX: ago, formatY: format }),
  }));
  const view = element(
    "section",
    { class: "stack" },
    element("h1", {}, "Server"),
    state,
    figures,
    element("div", { class: "charts" }, ...charts.map((chart) => element("div", { class: "card" }, chart.element))),
    traffic.element,
    jobs.element,
  );

  function draw() {
    if (!isShown || !history.times.length) return;
    state.hidden = true;
    replace(figures, ...now().flatMap(([name, text]) => element("div", { class: "card" }, element("dt", {}, name), element("dd", {}, text))));
    const indices = sampled();
    for (const { curves, set } of charts) set(curves.map(({ name, at }) => ({ name, points: points(at, indices) })));
    traffic.draw();
    jobs.draw();
  }
  history.addEventListener("sample", draw);
  return {
    element: view,
    show() {
      isShown = true;
      draw();
    },
    hide() {
      isShown = false;
    },
  };
}

/** @returns {[string, string][]} */
function now() {
  const last = history.times.length - 1;
  const kv = history.value("vllm:kv_cache_usage_perc");
  const tiers = /** @type {(keyof typeof TIERS)[]} */ (Object.keys(TIERS)).map((tier) => {
    const loaded = history.value("loradeck_adapter_loaded", { tier });
    const bytes = history.value("loradeck_adapter_bytes", { tier });
    return [`Adapters ${TIERS[tier]}`, `${count(loaded || 0)} · ${size(bytes || 0)}`];
  });
  return /** @type {[string, string][]} */ ([
    ["Generated tokens/s", number(rate("vllm:generation_tokens_total")(last))],
    ["Prompt tokens/s", number(rate("vllm:prompt_tokens_total")(last))],
    ["Requests running", number(history.value("vllm:num_requests_running"))],
    ["Requests waiting", number(history.value("vllm:num_requests_waiting"))],
    ["First token, median", duration(firstToken(0.5)(last))],
    ["First token, 99th percentile", duration(firstToken(0.99)(last))],
    ["KV cache in use", Number.isNaN(kv) ? "–" : percent(kv)],
    ...tiers,
  ]);
}

/** Return the samples to draw: the newest, and others at even distances before it. */
function sampled() {
  const total = history.times.length;
  const stride = Math.ceil(total / MOST);
  return Array.from({ length: Math.ceil(total / stride) }, (_, index) => total - 1 - index * stride).reverse();
}

/**
 * @param {(index: number) => number} at
 * @param {number[]} indices
 * @returns {[number, number][]}
 */
function points(at, indices) {
  const end = /** @type {number} */ (history.times.at(-1));
  const all = indices.map((index) => /** @type {[number, number]} */ ([(history.times[index] - end) / MINUTE, at(index)]));
  return all.filter(([, value]) => !Number.isNaN(value));
}

/** @param {number} minutes negative, before the newest sample */
function ago(minutes) {
  if (minutes > -0.005) return "now";
  return minutes > -1 ? `${Math.round(-minutes * MINUTE)} s ago` : `${number(-minutes)} min ago`;
}
