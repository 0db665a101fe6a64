// Draws the front: lines and points in one SVG, a logarithmic axis of distances over a linear one of cost.
import { count, number, ticks } from "./format.js";

const WIDTH = 480, HEIGHT = 300, LEFT = 52, RIGHT = 14, TOP = 16, BOTTOM = 42;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function roundValues(low, high) {
  const rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((value) => value >= rough * 0.999);
  const values = [];
  for (let n = Math.ceil(low / step); n <= Math.floor(high / step); n++) values.push(n * step);
  return values;
}

function powers(low, high) {
  const values = [];
  const steps = high - low > 2.5 ? [1] : [1, 2, 5];
  for (let decade = Math.floor(low); decade <= Math.ceil(high); decade++)
    for (const step of steps) values.push(step * 10 ** decade);
  return values.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}

export class Front {
  constructor(svg, onLimit) {
    this.svg = svg;
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    const drag = (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * WIDTH;
      const share = (at - LEFT) / (WIDTH - LEFT - RIGHT);
      onLimit(this.low + share * (this.high - this.low));
    };
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      svg.setPointerCapture(event.pointerId);
      drag(event);
    });
    svg.addEventListener("pointermove", (event) => {
      if (svg.hasPointerCapture(event.pointerId)) drag(event);
    });
  }

  // free, pinned: points [{cost, distance}]; scored: the same, measured; here: the policy; limit: a cost.
  draw({ free, pinned, scored, here, limit, label, distance }) {
    const positive = (points) => points.filter((point) => point.distance > 0);
    const largest = Math.max(...[...free, here].map((point) => point.distance), 1e-30);
    const floor = largest * 1e-6;
    const curves = [free, pinned].map((points) => positive(points).filter((point) => point.distance > floor));
    const dots = positive(scored);
    const distances = [...curves.flat(), ...dots].map((point) => point.distance);
    if (here.distance > floor) distances.push(here.distance);
    if (!distances.length) distances.push(1e-3, 1);
    const logs = distances.map(Math.log10);
    const margin = (Math.max(...logs) - Math.min(...logs)) * 0.05 || 0.2;
    const bottom = Math.min(...logs) - margin, top = Math.max(...logs) + margin;
    const costs = free.map((point) => point.cost);
    const spread = (Math.max(...costs) - Math.min(...costs)) * 0.03 || Math.abs(costs[0]) * 0.05 || 1;
    this.low = Math.min(...costs) - spread;
    this.high = Math.max(...costs) + spread;
    const x = (cost) => LEFT + ((cost - this.low) / (this.high - this.low)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => {
      const log = value > 0 ? Math.max(Math.log10(value), bottom) : bottom;
      return TOP + ((top - log) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    };
    const parts = [];
    const heights = powers(bottom, top), texts = ticks(heights);
    heights.forEach((value, n) => {
      parts.push(element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(element("text", { class: "tick y", x: LEFT - 6, y: y(value) + 4 }, texts[n]));
    });
    const ground = HEIGHT - BOTTOM;
    for (const value of roundValues(this.low, this.high)) {
      parts.push(element("line", { class: "grid", x1: x(value), x2: x(value), y1: ground, y2: ground + 4 }));
      parts.push(element("text", { class: "tick", x: x(value), y: ground + 17 }, count(value)));
    }
    parts.push(element("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: ground, y2: ground }));
    parts.push(element("text", { class: "label", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5 }, label));
    parts.push(element("text", { class: "label side", x: LEFT, y: 10 }, distance));
    parts.push(element("line", { class: "line-limit", x1: x(limit), x2: x(limit), y1: TOP, y2: ground }));
    for (const point of dots) {
      if (point.cost < this.low || point.cost > this.high) continue;
      parts.push(element("circle", { class: "scored", cx: x(point.cost), cy: y(point.distance), r: 2.2 }));
    }
    curves.forEach((points, place) => {
      if (points.length < 2) return;
      // Steps: between two policies of the front a budget gets the cheaper one, or one that is a little closer.
      const path = points.map((point, n) => {
        const across = x(point.cost).toFixed(1), up = y(point.distance).toFixed(1);
        return n ? `H${across}V${up}` : `M${across} ${up}`;
      });
      parts.push(element("path", { class: place ? "line-pinned" : "line-free", d: path.join("") }));
    });
    const mark = element("g", { class: "result", transform: `translate(${x(here.cost)} ${y(here.distance)})` });
    mark.append(element("circle", { r: 7 }), element("circle", { class: "core", r: 3 }));
    this.svg.replaceChildren(...parts, mark);
    this.svg.setAttribute("aria-label", `The front. This policy: ${label} ${count(here.cost)}, ${distance} ${number(here.distance)}`);
  }
}
