// The layers: for each group of sites that share their widths a row of radio buttons, native ones, so that the
// keyboard and screen readers know what to do with them.
import { bytes, number } from "./format.js";

const DECADES = 4;

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

export class Layers {
  constructor(holder, data, onPin) {
    this.rows = data.groups.map((group, index) => this.row(group, index, data, onPin));
    holder.classList.toggle("many", this.rows.length > 40);
    holder.replaceChildren(...this.rows.map((row) => row.element));
  }

  row(group, index, data, onPin) {
    const most = Math.max(...data.groups.flatMap((other) => other.rises), 1e-30);
    const shade = (rise) => (rise > 0 ? Math.min(Math.max(1 + Math.log10(rise / most) / DECADES, 0), 1) : 0);
    const more = group.sites.length > 1 ? `, shared by ${group.sites.length} layers: ${group.sites.slice(1).join(", ")}` : "";
    const about = made("small", { textContent: `${group.kind} ${group.shape.join(" × ")}${more}` });
    const name = made("span", {}, ...group.name.split(".").flatMap((part, n) => (n ? [".", made("wbr"), part] : [part])));
    const who = made("span", { className: "who" }, name, about);
    const bar = made("i");
    const track = made("span", { className: "track", ariaHidden: "true" }, bar);
    const size = made("span", { className: "bytes" });
    const weights = this.widths(`w${index}`, "bits", group.weight_bits, (width) => onPin(index, 0, width), (label, n) => {
      label.classList.add("rise");
      label.style.setProperty("--s", shade(group.rises[n]).toFixed(2));
      label.title = `${group.weight_bits[n]} bits: ${data.distance} +${number(Math.max(group.rises[n], 0))} alone, ${bytes(group.bytes[n])}`;
    });
    const choices = made("div", { className: "choices" }, weights.element);
    const inputs = group.activation_bits.length > 1
      ? this.widths(`a${index}`, "inputs", group.activation_bits, (width) => onPin(index, 1, width))
      : null;
    if (inputs) choices.append(inputs.element);
    const element = made("fieldset", { className: "layer" }, made("legend", { className: "hidden", textContent: group.name }),
      who, track, choices, size);
    return { element, who, bar, size, weights, inputs, group, text: group.sites.join(" ").toLowerCase() };
  }

  widths(name, what, widths, pin, each = () => {}) {
    const option = (value, text, kind) => {
      const input = made("input", { type: "radio", name, value });
      input.addEventListener("change", () => pin(value === "auto" ? null : Number(value)));
      return made("label", { className: kind }, input, made("span", { textContent: text }));
    };
    const auto = option("auto", "auto", "auto");
    auto.firstChild.checked = true;
    auto.firstChild.ariaLabel = `${what} auto`;
    const labels = widths.map((width, n) => {
      const label = option(String(width), width === 16 ? "float" : String(width), "width");
      label.firstChild.ariaLabel = width === 16 ? `${what} float` : `${what} ${width}`;
      each(label, n);
      return label;
    });
    const element = made("div", { className: "widths" }, made("em", { textContent: what }), auto, ...labels);
    return { element, widths, labels, auto };
  }

  // widths: for each group the planned widths; pins: index to [weight, activation].
  update(widths, pins) {
    this.rows.forEach((row, index) => {
      const [weight, activation] = widths[index];
      const place = row.group.weight_bits.indexOf(weight);
      row.bar.className = `b${weight}`;
      row.bar.style.width = `${weight * 12.5}%`;
      const none = weight === 0 ? "left out" : "shared";
      row.size.textContent = row.group.bytes[place] ? bytes(row.group.bytes[place]) : none;
      row.who.classList.toggle("pinned", index in pins);
      for (const [part, planned, pinned] of [[row.weights, weight, pins[index]?.[0]], [row.inputs, activation, pins[index]?.[1]]]) {
        if (!part) continue;
        part.labels.forEach((label, n) => label.classList.toggle("planned", part.widths[n] === planned));
        const wanted = pinned == null ? part.auto : part.labels[part.widths.indexOf(pinned)];
        if (wanted) wanted.firstChild.checked = true;
      }
    });
  }

  filter(text) {
    let shown = 0;
    for (const row of this.rows) {
      const fits = row.text.includes(text.toLowerCase());
      row.element.hidden = !fits;
      row.element.classList.toggle("empty", !fits);
      shown += fits;
    }
    return shown;
  }
}
