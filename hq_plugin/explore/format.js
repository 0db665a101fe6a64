// Numbers as people read them, the same as in reports.
const EXPONENTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

// A measured number.
export function number(value) {
  return Math.abs(value) >= 1000 ? count(value) : String(Number(value.toPrecision(3)));
}

// The values along an axis, where there is little room: all in one manner.
export function ticks(values) {
  const small = values.some((value) => value !== 0 && Math.abs(value) < 0.001);
  return values.map((value) => tick(value, small));
}

function tick(value, powers) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return count(value);
  if (!powers || Math.abs(value) >= 1) return String(Number(value.toPrecision(3)));
  const exponent = Math.floor(Math.log10(Math.abs(value)) + 1e-9);
  const factor = Number((value / 10 ** exponent).toPrecision(2));
  const power = `10⁻${[...String(-exponent)].map((digit) => EXPONENTS[digit]).join("")}`;
  return factor === 1 ? power : `${factor}·${power}`;
}

export function count(value) {
  for (const prefix of ["", "k", "M", "G"]) {
    if (Math.abs(value) < 999.5) return `${Number(value.toPrecision(3))}${prefix && ` ${prefix}`}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(4))} T`;
}

export function bytes(value) {
  const text = count(value);
  return text.includes(" ") ? `${text}B` : `${text} B`;
}

export function cost(axis, value) {
  if (axis === "weight_bits") return `${value.toFixed(3)} bits`;
  if (axis === "size") return bytes(value);
  if (axis === "bitops") return `${count(value)}BitOps`.replace(/(\d)B/, "$1 B");
  return `${Number(value.toPrecision(4)).toLocaleString("en")} ${axis === "energy_uj" ? "µJ" : "ms"}`;
}
