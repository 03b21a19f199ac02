// The allocation as one column a layer: what stays, on what there was.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 220;
const LEFT = 56;
const BOTTOM = 22;

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export function draw(svg, widths, neurons) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const tall = HEIGHT - BOTTOM - 8;
  const step = (WIDTH - LEFT) / widths.length;
  const every = Math.ceil(widths.length / 20);
  for (const share of [0, 0.5, 1]) {
    add(svg, "text", { x: LEFT - 6, y: 12 + (1 - share) * tall, "text-anchor": "end" }, Math.round(share * neurons));
  }
  widths.forEach((width, layer) => {
    const x = LEFT + layer * step + step * 0.1;
    const height = (tall * width) / neurons;
    const column = add(svg, "g", {});
    add(column, "title", {}, `layer ${layer}: ${width} of ${neurons} neurons`);
    add(column, "rect", { class: "whole", x, y: 8, width: step * 0.8, height: tall, rx: 2 });
    add(column, "rect", { class: "kept", x, y: 8 + tall - height, width: step * 0.8, height, rx: 2 });
    if (layer % every === 0) {
      add(svg, "text", { x: x + step * 0.4, y: HEIGHT - 6, "text-anchor": "middle" }, layer);
    }
  });
}
