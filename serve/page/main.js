import * as api from "./api.js";
import { draw } from "./chart.js";
import { drawCurve } from "./curve.js";

const $ = (id) => document.getElementById(id);
const STEPS = 1000;
const GIB = 2 ** 30;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

let offered = [];
let answer; // The last allocation shown.
let asking; // Ends the request for an allocation that a newer one has overtaken.
let following; // Ends the stream of the checkpoint shown before.

const model = () => offered.find((each) => each.name === $("model").value);
const kind = () => document.querySelector("input[name=kind]:checked").value;

function count(value) {
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "K"]];
  const [scale, unit] = units.find(([least]) => value >= least) ?? [1, ""];
  return `${(value / scale).toFixed(scale === 1 ? 0 : 3)} ${unit}`.trim();
}

function size(value) {
  const [scale, unit] = value >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
  return `${(value / scale).toFixed(3)} ${unit}`;
}

const milliseconds = (seconds) => `${(1000 * seconds).toPrecision(4)} ms a token`;

const bits = () => Number($("bits").value);

// What the slider spans: fewer bits make other sizes.
function span() {
  const quantised = kind() === "bytes" && model().quantised.find((each) => each.bits === bits());
  return quantised ? quantised.bytes : model().targets[kind()];
}

// How the checkpoint is to be written.
const written = () => ({ format: $("format").value, recovery: $("recovery").value, bits: bits() });

// To the right is always smaller: a slider of ratios and one of sizes then mean the same.
function target() {
  if (kind() === "memory") {
    const whole = (id) => Math.max(Number($(id).min), Math.round(Number($(id).value)));
    const memory = Math.max(1, Math.round(Number($("memory").value) * GIB));
    return { memory, context: whole("context"), images: whole("images"), batch: whole("batch") };
  }
  const share = Number($("slider").value) / STEPS;
  if (kind() === "latency") {
    const [device, phase] = [$("device").value, $("phase").value];
    const times = model().devices.find((each) => each.name === device)[phase];
    return { latency: times.largest - share * (times.largest - times.least), device, phase };
  }
  const range = span();
  if (kind() === "ratio") return { ratio: Math.min(Number((share * range.largest).toFixed(4)), range.largest) };
  return { [kind()]: Math.round(range.largest - share * (range.largest - range.least)) };
}

function asked({ ratio, parameters, bytes, memory, latency }) {
  if (ratio !== undefined) return percent(ratio);
  if (memory !== undefined) return size(memory);
  if (latency !== undefined) return milliseconds(latency);
  return parameters !== undefined ? count(parameters) : size(bytes);
}

function complain(error) {
  if (error?.name === "AbortError") return;
  if (error?.status === 401) {
    $("key-box").hidden = false;
    $("key-box").open = true;
  }
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

async function ask() {
  asking?.abort();
  asking = new AbortController();
  $("ask").ariaBusy = "true";
  const wanted = target();
  $("asked").value = asked(wanted);
  $("slider").setAttribute("aria-valuetext", asked(wanted));
  try {
    const question = { model: model().name, target: wanted, ...written() };
    answer = { ...(await api.allocation(question, asking.signal)), target: wanted };
    show();
    complain();
    $("ask").ariaBusy = "false";
  } catch (error) {
    complain(error);
  }
}

function show() {
  const dense = model();
  $("ratio").textContent = percent(answer.ratio);
  $("parameters").textContent = count(answer.parameters);
  $("bytes").textContent = size(answer.bytes);
  const expected = answer.expected_accuracy;
  $("accuracy").textContent = expected
    ? `${percent(expected.value)} (${percent(expected.low)} to ${percent(expected.high)})`
    : "not measured here";
  $("source").textContent = expected ? measured(dense.accuracy.find((curve) => curve.recovery === expected.recovery)) : "";
  const taken = { memory: answer.memory && size(answer.memory), latency: answer.latency && milliseconds(answer.latency) }[kind()];
  $("taken-box").hidden = !taken;
  $("taken-name").textContent = kind() === "memory" ? "Memory taken" : "Latency";
  $("taken").textContent = taken ?? "";
  showCurve();
  $("share").style.width = percent(answer.bytes / dense.bytes);
  $("share-text").textContent = `${percent(answer.bytes / dense.bytes)} of the dense model's bytes, vision tower included`;
  for (const id of ["heads", "heads-title", "heads-column"]) $(id).toggleAttribute("hidden", !answer.groups);
  drawParts();
  const range = (kept) => [...new Set([Math.min(...kept), Math.max(...kept)])].join(" to ");
  $("chart-text").textContent =
    `${dense.layers} layers keep ${range(answer.widths)} of ${dense.neurons} FFN neurons each, ${answer.kept_neurons} in all` +
    (answer.groups ? `, and ${range(answer.groups)} of ${dense.groups} groups of attention heads.` : ".");
  $("rows").replaceChildren(
    ...answer.widths.map((width, layer) => {
      const row = document.createElement("tr");
      const groups = answer.groups ? [answer.groups[layer]] : [];
      for (const text of [layer, width, percent(answer.ratios[layer]), ...groups]) row.insertCell().textContent = text;
      return row;
    }),
  );
  $("make-button").disabled = false;
}

function drawParts() {
  draw($("chart"), answer.widths, model().neurons, "neurons");
  if (answer.groups) draw($("heads"), answer.groups, model().groups, "groups of attention heads");
}

function showCurve() {
  const dense = model();
  const recovery = answer.expected_accuracy?.recovery ?? $("recovery").value;
  const curve = dense.accuracy.find((each) => each.recovery === recovery) ?? dense.accuracy[0];
  $("curve-box").hidden = !curve;
  if (!curve) return;
  const chosen = { ...answer.expected_accuracy, bytes: answer.bytes };
  drawCurve($("curve"), dense, curve, chosen, size);
  const say = ({ value, low, high }) => `${percent(value)} (${percent(low)} to ${percent(high)})`;
  const whole = curve.points.find((point) => point.ratio === 0);
  $("curve-text").textContent = [
    whole && `Dense, ${size(dense.bytes)}: ${say(whole)}.`,
    answer.expected_accuracy ? `Chosen, ${size(chosen.bytes)}: ${say(chosen)}.` : `Chosen, ${size(chosen.bytes)}: its quality is not known.`,
    `${curve.points.length} sizes measured; bars are 95% intervals.`,
  ].filter(Boolean).join(" ");
}

// Which inputs belong to what the size is set by.
function showInputs() {
  $("card").hidden = kind() !== "memory";
  $("slider-box").hidden = kind() === "memory";
  $("device-box").hidden = kind() !== "latency";
  for (const button of document.querySelectorAll("[data-gib]")) {
    button.ariaPressed = String(Number(button.dataset.gib) === Number($("memory").value));
  }
  ask();
}

function measured({ source, samples, recovery }) {
  const how = recovery === "none" ? "without recovery" : `with recovery ${recovery}`;
  return `Expected accuracy: ${source}, ${how}; ${samples} questions, 95% interval, interpolated between measured sizes.`;
}

function choices(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}

function choose() {
  const chosen = model();
  $("dense").textContent =
    `Dense: ${count(chosen.parameters)} parameters, ${size(chosen.bytes)}, ${chosen.layers} layers of ${chosen.neurons} neurons` +
    (chosen.groups ? ` and ${chosen.groups} groups of attention heads` : "");
  choices($("format"), chosen.formats);
  choices($("recovery"), chosen.recoveries);
  $("recovery").value = chosen.recovery;
  choices($("bits"), chosen.bits);
  $("device").replaceChildren(...chosen.devices.map(({ name, description }) => new Option(`${name} (${description})`, name)));
  $("latency-kind").hidden = chosen.devices.length === 0;
  if (kind() === "latency" && chosen.devices.length === 0) document.querySelector("input[value=ratio]").checked = true;
  showInputs();
}

async function make(event) {
  event.preventDefault();
  const request = { model: model().name, target: answer.target, ...written() };
  try {
    const job = await api.make(request);
    complain();
    await follow(job);
  } catch (error) {
    complain(error);
  }
}

async function follow(job) {
  following?.abort();
  following = new AbortController();
  showJob(job);
  for (let state = job.state; state === "queued" || state === "running"; ) {
    for await (const [event, data] of api.follow(job.url, following.signal)) {
      state = event === "removed" ? event : data.state;
      if (event === "removed") $("job").hidden = true;
      else showJob(data);
    }
  }
}

function showJob(job) {
  $("job").hidden = false;
  $("job").dataset.url = job.url;
  $("job").dataset.state = job.state;
  $("job-id").textContent = job.id;
  $("job-state").textContent = { queued: "Queued", running: "Exporting", complete: "Complete", evicted: "Evicted" }[job.state]
    ?? `Failed: ${job.error}`;
  if (job.progress?.step === "recover") $("job-state").textContent = "Recovering";
  const ended = job.state !== "queued" && job.state !== "running";
  $("job-progress").hidden = ended;
  $("job-progress").value = job.progress ? job.progress.done / job.progress.total : 0;
  $("cancel").textContent = ended ? "Remove" : "Cancel";
  $("cancel").onclick = () => api.remove(job.id).then(() => ($("job").hidden = true)).catch(complain);
  $("done").hidden = job.state !== "complete";
  $("files").replaceChildren(...Object.entries(job.files).map(([name, file]) => fileItem(name, file)));
  $("snippet").textContent = snippet(job);
}

function fileItem(name, file) {
  const item = document.createElement("li");
  const link = Object.assign(document.createElement("a"), { href: file.url, download: name, textContent: name });
  item.append(link, ` ${file.bytes >= 1e6 ? size(file.bytes) : `${(file.bytes / 1e3).toFixed(1)} kB`}`);
  return item;
}

function snippet(job) {
  const wanted = Object.entries(job.target).map(([name, value]) => `${name}=${JSON.stringify(value)}`).join(", ");
  return [
    "import lop",
    `folder = lop.Client("${location.origin}").get("${job.model}", ${wanted}, format="${job.format}", ` +
      `recovery="${job.recovery}", ${job.bits === 16 ? "" : `bits=${job.bits}, `}out="${job.model}-${job.id.slice(0, 8)}")`,
    "model = lop.load(folder)",
  ].join("\n");
}

async function start() {
  try {
    offered = await api.models();
    choices($("model"), offered.map((each) => each.name));
    choose();
  } catch (error) {
    complain(error);
  }
}

$("model").addEventListener("change", choose);
$("slider").addEventListener("input", ask);
$("format").addEventListener("change", ask);
$("recovery").addEventListener("change", ask);
$("bits").addEventListener("change", ask);
for (const radio of document.querySelectorAll("input[name=kind]")) radio.addEventListener("change", showInputs);
for (const id of ["memory", "context", "images", "batch"]) $(id).addEventListener("input", showInputs);
for (const id of ["device", "phase"]) $(id).addEventListener("change", ask);
for (const button of document.querySelectorAll("[data-gib]")) {
  button.addEventListener("click", () => {
    $("memory").value = button.dataset.gib;
    showInputs();
  });
}
$("make").addEventListener("submit", make);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey($("key").value);
  start();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copied").textContent = "Copied";
  } catch {
    // Over plain HTTP from another machine a page may not write to the clipboard.
    getSelection().selectAllChildren($("snippet"));
    $("copied").textContent = "Selected: copy it with the keyboard";
  }
});
new ResizeObserver(() => answer && drawParts()).observe($("chart"));
new ResizeObserver(() => answer && showCurve()).observe($("curve"));

start();
