// The page's state: which cost is limited, the limit, and the pins. It is kept in the address after "#", so that a
// reload or a bookmark finds it again. Every number shown comes from the server.
import { cost, count, number } from "./format.js";
import { Front } from "./front.js";
import { Layers } from "./layers.js";

const at = (id) => document.getElementById(id);
const state = { axis: null, limit: null, pins: {} };
let data, layers, front, free, answer, least = 0, most = 1, address;

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const names = data.axes.map((axis) => axis.name);
  state.axis = names.includes(given.get("axis")) ? given.get("axis") : names[0];
  const limit = Number.parseFloat(given.get("limit"));
  state.limit = Number.isFinite(limit) ? limit : null;
  state.pins = {};
  for (const pin of given.getAll("pin")) {
    const cut = pin.lastIndexOf(":");
    const index = data.groups.findIndex((group) => group.name === pin.slice(0, cut));
    if (index < 0) continue;
    const [weight, activation] = pin.slice(cut + 1).split(",").map((part) => (part ? Number(part) : null));
    const group = data.groups[index];
    const fits = (width, widths) => (widths.includes(width) ? width : null);
    const pinned = [fits(weight, group.weight_bits), fits(activation ?? null, group.activation_bits)];
    if (pinned.some((width) => width !== null)) state.pins[index] = pinned;
  }
}

function writeHash() {
  const parts = new URLSearchParams({ axis: state.axis, limit: String(Number(answer.limit.toPrecision(9))) });
  for (const [index, [weight, activation]] of Object.entries(state.pins))
    parts.append("pin", `${data.groups[index].name}:${weight ?? ""},${activation ?? ""}`);
  history.replaceState(null, "", `#${parts}`);
}

// One question is asked at a time; while it is answered, only the newest of those that come up is kept.
let asking = false, again = false, wantFront = true;
async function refresh(pinsChanged = false) {
  wantFront ||= pinsChanged;
  if (asking) { again = true; return; }
  asking = true;
  at("main").setAttribute("aria-busy", "true");
  do {
    again = false;
    const pins = Object.fromEntries(Object.entries(state.pins).map(([index, pinned]) => [data.groups[index].name, pinned]));
    const question = { axis: state.axis, limit: state.limit, pins, front: wantFront };
    try {
      if (!free || free.axis !== state.axis) free = { axis: state.axis, ...(await ask({ ...question, limit: null, pins: {}, front: true })) };
      const next = await ask(question);
      answer = { ...next, front: next.front ?? answer.front };
      wantFront = again && wantFront;
      show();
      problem("");
    } catch (error) {
      problem(error instanceof TypeError ? "The server does not answer: has hq-plugin explore ended? Start it again." : error.message);
    }
  } while (again);
  asking = false;
  at("main").setAttribute("aria-busy", "false");
}

async function ask(question) {
  const response = await fetch("plan", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) });
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

function show() {
  const pinned = Object.keys(state.pins).length;
  least = answer.least;
  most = answer.most;
  const point = (of) => ({ cost: of[state.axis], distance: of.expected });
  front.draw({
    free: free.front.map(point),
    pinned: pinned ? answer.front.map(point) : [],
    scored: data.scored.map((of) => ({ cost: of[state.axis], distance: of.score })),
    here: point(answer),
    limit: answer.limit,
    label: data.axes.find((axis) => axis.name === state.axis).label,
    distance: `${data.distance}, predicted`,
  });
  at("legend-pinned").hidden = !pinned;
  // While a control is dragged or typed in, it says what the user said.
  if (document.activeElement !== at("limit")) at("limit").value = position(answer.limit);
  if (document.activeElement !== at("exact")) at("exact").value = Number(answer.limit.toPrecision(6));
  at("limit").setAttribute("aria-valuetext", cost(state.axis, answer.limit));
  at("raised").hidden = !answer.raised;
  at("raised").textContent = `${pinned ? "With these pins nothing" : "Nothing"} is below ${cost(state.axis, answer.least)}: that is shown.`;
  tiles();
  layers.update(answer.widths, state.pins);
  at("count").textContent = pinned ? `${pinned} pinned` : "nothing pinned";
  at("clear").disabled = !pinned;
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(new Blob([JSON.stringify(answer.policy, null, 1)], { type: "application/json" }));
  at("download").href = address;
  writeHash();
}

function tiles() {
  const shown = [
    ["main", `${data.distance}, predicted`, answer.expected ? number(answer.expected) : "about 0", data.calibrated_on ? "before fine-tuning, calibrated" : "not calibrated"],
    ["", "size", cost("size", answer.size), `${(data.float_size / answer.size).toFixed(1)} times smaller`],
    ["", "effective bits", answer.weight_bits.toFixed(3), "a weight"],
    ["", "BitOps", count(answer.bitops), "of a sample"],
    ["", "energy", cost("energy_uj", answer.energy_uj), "by a table"],
  ];
  if (answer.latency_ms != null) shown.push(["", "latency", cost("latency_ms", answer.latency_ms), `of ${data.latency_batch}, by the profile`]);
  at("tiles").replaceChildren(...shown.map(([kind, name, value, note]) => {
    const tile = document.createElement("div");
    tile.className = kind;
    const [dt, dd, small] = ["dt", "dd", "small"].map((tag) => document.createElement(tag));
    dt.textContent = name;
    small.textContent = note;
    dd.append(value, small);
    tile.append(dt, dd);
    return tile;
  }));
}

const position = (limit) => Math.round(((limit - least) / (most - least || 1)) * 1000);

function setLimit(limit) {
  if (!Number.isFinite(limit)) return;
  state.limit = Math.max(limit, 0);
  refresh();
}

function pin(index, column, width) {
  const pinned = state.pins[index] ?? [null, null];
  pinned[column] = width;
  if (pinned.every((value) => value === null)) delete state.pins[index];
  else state.pins[index] = pinned;
  refresh(true);
}

function texts() {
  at("model").textContent = data.model;
  at("about").textContent = `${data.groups.length} groups of layers; session ${data.directory}`;
  document.title = `${data.model}: choose a budget`;
  at("calibration").textContent = data.calibrated_on
    ? `Nothing is run here. What each width costs alone is added up, and corrected by what ${data.calibrated_on} policies of this session's searches were measured at.`
    : "Nothing is run here: what each width costs alone in the rounded float model is added up. Training brings policies closer than that. " + (data.scored.length
      ? `Too few policies, ${data.scored.length}, were measured to correct that.`
      : "Search a budget and save the session again, and predictions are corrected by what was measured.");
  at("legend-scored").hidden = !data.scored.length;
  // A word stays whole where it fits a line: browsers break at hyphens, and options are full of them.
  at("command").replaceChildren(...data.command.split(" ").flatMap((word) => {
    const whole = document.createElement("span");
    whole.textContent = word;
    return [whole, " "];
  }));
  at("where").textContent = "Then, in the folder that it is in, fine-tune and convert:"
    + (data.model_is_known ? "" : " put your model and your data where it says MODEL and DATA.");
  at("python").textContent = [
    "import hq_plugin as hq",
    "",
    `session = hq.load_session(${JSON.stringify(data.directory)}, model, data)`,
    'policy = hq.HybridPolicy.from_json(open("policy.json").read())',
    "small = session.finetune(policy)",
    'hq.save(small, "small")',
  ].join("\n");
}

function axes() {
  const labels = { weight_bits: "effective bits", size: "size", bitops: "BitOps", energy_uj: "energy", latency_ms: "latency" };
  const units = { weight_bits: "bits", size: "bytes", bitops: "BitOps", energy_uj: "µJ", latency_ms: "ms" };
  const select = () => {
    at("unit").textContent = units[state.axis];
    for (const input of at("axes").querySelectorAll("input")) input.checked = input.value === state.axis;
  };
  for (const axis of data.axes) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "axis", value: axis.name });
    const text = document.createElement("span");
    text.textContent = labels[axis.name];
    input.addEventListener("change", () => {
      // The same policy, looked at along another cost.
      state.axis = axis.name;
      state.limit = answer[axis.name];
      select();
      refresh(true);
    });
    label.append(input, text);
    at("axes").append(label);
  }
  return select;
}

async function start() {
  try {
    data = await (await fetch("data.json")).json();
  } catch {
    problem("The server does not answer: has hq-plugin explore ended? Start it again.");
    return;
  }
  texts();
  front = new Front(at("front"), setLimit);
  layers = new Layers(at("rows"), data, pin);
  const select = axes();
  const restart = () => { readHash(); select(); refresh(true); };
  at("limit").addEventListener("input", () => setLimit(least + (at("limit").value / 1000) * (most - least)));
  at("exact").addEventListener("change", () => setLimit(at("exact").valueAsNumber));
  at("filter").addEventListener("input", () => {
    const shown = layers.filter(at("filter").value);
    at("count").textContent = `${shown} of ${data.groups.length} shown`;
  });
  at("clear").addEventListener("click", () => { state.pins = {}; refresh(true); });
  at("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(data.command);
    at("copy").textContent = "Copied";
    setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
  });
  window.addEventListener("hashchange", restart);
  restart();
}

start();
