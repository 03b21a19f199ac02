// Size against quality: what was measured, the dense model on it, and the size that was asked for.

import { add } from "./chart.js";

const [TOP, RIGHT, BOTTOM, LEFT] = [12, 14, 36, 52];
const percent = (share) => `${(100 * share).toFixed(1)}%`;

// Checkpoints of the default format are as much smaller as neurons are taken.
export function bytesOf(model, ratio) {
  const { bytes, ratio: ratios } = model.targets;
  return bytes.largest - (ratio / ratios.largest) * (bytes.largest - bytes.least);
}

function scale([from, to], [low, high]) {
  return (value) => low + ((value - from) / (to - from || 1)) * (high - low);
}

function interval(svg, kind, x, y, point) {
  add(svg, "line", { class: `${kind} interval`, x1: x, x2: x, y1: y(point.low), y2: y(point.high) });
  for (const end of [point.low, point.high]) {
    add(svg, "line", { class: `${kind} interval`, x1: x - 4, x2: x + 4, y1: y(end), y2: y(end) });
  }
}

// `chosen`: { bytes, value, low, high }, or { bytes } alone where the quality of what was asked for is not known.
export function drawCurve(svg, model, curve, chosen, size) {
  const { width, height } = svg.getBoundingClientRect();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const points = curve.points.map((point) => ({ ...point, bytes: bytesOf(model, point.ratio) }));
  const isKnown = chosen.value !== undefined;
  const all = isKnown ? [...points, chosen] : points;
  const sizes = [...points, chosen].map((point) => point.bytes);
  const margin = 0.05 * (Math.max(...sizes) - Math.min(...sizes)) || 1;
  const low = Math.max(0, Math.min(...all.map((point) => point.low)) - 0.01);
  const high = Math.min(1, Math.max(...all.map((point) => point.high)) + 0.01);
  const x = scale([Math.min(...sizes) - margin, Math.max(...sizes) + margin], [LEFT, width - RIGHT]);
  const y = scale([low, high], [height - BOTTOM, TOP]);
  for (const share of [0, 0.5, 1]) {
    const value = low + share * (high - low);
    add(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
    add(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, percent(value));
  }
  const ends = [...new Set([Math.min(...sizes), Math.max(...sizes)])];
  for (const [place, value] of ends.entries()) {
    const anchor = place === 0 ? "start" : "end";
    add(svg, "text", { x: x(value), y: height - BOTTOM + 16, "text-anchor": anchor }, size(value));
  }
  add(svg, "text", { x: (LEFT + width) / 2, y: height - 4, "text-anchor": "middle" }, "size of the checkpoint");
  add(svg, "polyline", { class: "measured", points: points.map((p) => `${x(p.bytes)},${y(p.value)}`).join(" ") });
  for (const point of points) {
    const isDense = point.ratio === 0;
    const kind = isDense ? "dense" : "measured";
    interval(svg, kind, x(point.bytes), y, point);
    const mark = add(svg, "circle", { class: kind, cx: x(point.bytes), cy: y(point.value), r: isDense ? 6 : 4 });
    const what = isDense ? "dense" : `${percent(point.ratio)} pruned`;
    add(mark, "title", {}, `${what}: ${percent(point.value)} (${percent(point.low)} to ${percent(point.high)})`);
  }
  if (!isKnown) {
    add(svg, "line", { class: "unknown", x1: x(chosen.bytes), x2: x(chosen.bytes), y1: TOP, y2: height - BOTTOM });
  } else {
    interval(svg, "chosen", x(chosen.bytes), y, chosen);
    const mark = add(svg, "circle", { class: "chosen", cx: x(chosen.bytes), cy: y(chosen.value), r: 8 });
    add(mark, "title", {}, `chosen: ${percent(chosen.value)} expected`);
  }
}
