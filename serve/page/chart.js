// One part of the allocation as one column a layer: what stays, on what there was.

const SVG = "http://www.w3.org/2000/svg";
const TOP = 10;
const LEFT = 52;
const BOTTOM = 22;
const LABEL = 28; // Room for a layer's number.

export function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// In the page's own pixels, so that labels are as large on a phone as elsewhere.
export function draw(svg, widths, whole, unit) {
  const { width: wide, height: high } = svg.getBoundingClientRect();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const tall = high - BOTTOM - TOP;
  const step = (wide - LEFT) / widths.length;
  const every = Math.ceil(LABEL / step);
  for (const share of whole % 2 ? [0, 1] : [0, 0.5, 1]) {
    add(svg, "text", { x: LEFT - 6, y: TOP + 4 + (1 - share) * tall, "text-anchor": "end" }, share * whole);
  }
  widths.forEach((width, layer) => {
    const x = LEFT + layer * step + step * 0.1;
    const height = (tall * width) / whole;
    const column = add(svg, "g", {});
    add(column, "title", {}, `layer ${layer}: ${width} of ${whole} ${unit}`);
    add(column, "rect", { class: "whole", x, y: TOP, width: step * 0.8, height: tall, rx: 2 });
    add(column, "rect", { class: "kept", x, y: TOP + tall - height, width: step * 0.8, height, rx: 2 });
    if (layer % every === 0) {
      add(svg, "text", { x: x + step * 0.4, y: high - 6, "text-anchor": "middle" }, layer);
    }
  });
}
