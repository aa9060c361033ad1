"use strict";
// Everything that comes from the run is put into the page as text: `el` makes text nodes of strings.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("report");
const root = { append: (...parts) => page.append(...parts.filter((part) => part !== null)) };
const kinds = Object.keys(data.kinds);
const color = (kind) => `var(--${kind})`;
const SYMBOLS = { fault: "times", backup: "triangle", dropped: "square", quarantined: "diamond2", released: "circle" };
const MEANINGS = {
  fault: "fault",
  backup: "begins a backup attempt",
  dropped: "ends an attempt that another card overtook",
  quarantined: "is quarantined",
  released: "its place is given back",
};

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined).map((child) => child instanceof Node ? child : String(child)));
  return element;
}

const number = (value, digits = 0) => value === null || value === undefined ? "-" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const rate = (value) => value === null || value === undefined ? "-" : value >= 100 ? number(value, 0) : value >= 0.1 ? number(value, 2) : value.toPrecision(2);
const percent = (value) => value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)} %`;
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
function clock(seconds) {
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  return data.time_s < 20 ? `${+seconds.toFixed(2)} s` : parts.map((part, place) => place ? String(part).padStart(2, "0") : part).join(":");
}

// -- the head ------------------------------------------------------------------------------------------------------

const stateClass = data.state.startsWith("complete") ? "complete" : data.state === "running" ? "running" : "stopped";
const signs = { complete: "\u2713", running: "\u25b6", stopped: "\u25a0" };
const tile = (label, value, bad) => el("div", { class: bad ? "tile bad" : "tile", "data-name": label }, el("b", {}, value), el("span", {}, label));

root.append(
  el("header", {},
    el("p", { class: "quiet" }, "gaudi-batch report"),
    el("h1", {}, data.output),
    el("p", {}, el("span", { class: `state ${stateClass}` }, `${signs[stateClass]} ${data.state}`), data.reason ? ` ${data.reason}` : ""),
    el("p", { class: "quiet" }, `run ${data.run_id || "without an id"}, begun ${data.created_at}; this page was made ${data.made_at} by gaudi-batch ${data.version}`),
    data.note ? el("p", {}, data.note) : null,
  ),
  el("section", { class: "tiles", "aria-label": "figures" },
    tile(`images ${data.note ? "committed, " : ""}of ${number(data.images_planned)} planned`, number(data.images)),
    tile(`failed rows of ${number(data.rows)} done`, number(data.failed_rows), data.failed_rows > 0),
    tile(data.drivers.length > 1 ? `wall time, ${data.drivers.length} drivers` : "wall time", duration(data.wall_s)),
    tile("images/s of wall time", rate(data.images_per_s_wall)),
    tile("images/s of generation", rate(data.images_per_s)),
    tile(data.card_hours === null ? "cards" : `cards, ${number(data.card_hours, 2)} card-hours`, number(data.cards_ready)),
    data.joules_per_image ? tile(`joules an image; ${number(data.energy_j / 3.6e6, 2)} kWh`, number(data.joules_per_image, 1)) : null,
    data.cost_words[0] ? tile(data.cost_words[1] ? `cost; ${data.cost_words[1]} an image` : "cost", data.cost_words[0]) : null,
  ),
);

// -- plots ---------------------------------------------------------------------------------------------------------

const names = data.cards.map((card) => card.name);
const flags = new Map(data.cards.map((card) => [card.name, card.flags.join("; ")]));
const words = new Map(data.cards.map((card) => [card.name, card.flags.map((flag) => flag.split(":")[0]).filter((flag) => !/fault/.test(flag)).join(", ")]));
const labels = new Map(data.cards.map((card) => [card.name, card.label]));
const shortened = (name, length) => name.length <= length ? name : `${name.slice(0, Math.floor((length - 1) / 2))}\u2026${name.slice(-Math.ceil((length - 1) / 2))}`;
const sign = (card) => flags.get(card) ? "\u26a0 " : "";
const label = (card) => `${sign(card)}${shortened(labels.get(card), 24)}${words.get(card) ? ` (${words.get(card)})` : ""}`;
const breaks = data.drivers.slice(1).map((driver) => driver.start);
const big = matchMedia("(min-width: 1900px)");
const rowHeight = () => (names.length <= 16 ? 26 : names.length <= 48 ? 18 : names.length <= 128 ? 12 : 9) * (big.matches ? 1.4 : 1);

// Where there is little room the words of a card are left out first, and then the middle of its name.
const pen = document.createElement("canvas").getContext("2d");
function fitted(card, room) {
  const name = labels.get(card);
  const shorter = d3.range(24, 5, -1).map((length) => shortened(name.split(", ")[0], length));
  const texts = [label(card), ...[shortened(name, 24), ...shorter].map((text) => sign(card) + text)];
  pen.font = `${big.matches ? 14 : 11}px system-ui, sans-serif`;
  return texts.find((text) => pen.measureText(text).width <= room) ?? texts.at(-1);
}

function axes(width) {
  const longest = Math.max(4, ...names.map((name) => label(name).length));
  return {
    width,
    marginLeft: Math.min(longest * (big.matches ? 8.5 : 6.8) + 12, width * 0.35),
    marginRight: 16,
    marginTop: 8,
    marginBottom: 34,
    x: { domain: [0, Math.max(data.time_s, 1e-3)], tickFormat: clock, label: "time of the run", ticks: Math.max(2, Math.floor(width / 140)) },
  };
}
function cardAxis(width) {
  const room = axes(width).marginLeft - 10; // a name ends before the bars begin
  return Plot.axisY({
    tickSize: 0,
    tickFormat: (card) => fitted(card, room),
    title: (card) => [card, flags.get(card)].filter(Boolean).join(": "),
  });
}
const rules = () => Plot.ruleX(breaks, { stroke: "currentColor", strokeDasharray: "4 3", title: () => "another driver goes on" });

function timeline(width) {
  const bars = kinds.map((kind, place) => Plot.barX(data.stretches.filter((stretch) => stretch[1] === place), {
    y: (stretch) => names[stretch[0]],
    x1: (stretch) => stretch[2],
    x2: (stretch) => stretch[3],
    fill: color(kind),
    insetTop: 1,
    insetBottom: 1,
    shapeRendering: "crispEdges",
    ariaDescription: kind,
    title: (stretch) => `${names[stretch[0]]}: ${kind}, ${clock(stretch[2])} to ${clock(stretch[3])} (${duration(stretch[3] - stretch[2])})`,
  }));
  const marks = Object.entries(SYMBOLS).map(([kind, symbol]) => Plot.dot(data.marks.filter((mark) => mark[1] === kind), {
    y: (mark) => names[mark[0]],
    x: (mark) => mark[2],
    symbol,
    r: big.matches ? 7 : 5,
    fill: kind === "fault" ? "none" : "var(--paper)",
    stroke: "currentColor",
    strokeWidth: 2,
    ariaDescription: kind,
    title: (mark) => `${names[mark[0]]} at ${clock(mark[2])}: ${MEANINGS[kind]}${mark[3] ? `: ${mark[3]}` : ""}`,
  }));
  return Plot.plot({
    ...axes(width),
    height: names.length * rowHeight() + 48,
    y: { domain: names, label: null, padding: 0.1 },
    marks: [cardAxis(width), ...bars, rules(), ...marks],
    ariaLabel: "timeline of the cards",
  });
}

function rateOfAll(width) {
  const step = data.rates.bin_s;
  const bins = data.rates.all.map((value, place) => ({ x1: place * step, x2: (place + 1) * step, value }));
  return Plot.plot({
    ...axes(width),
    height: big.matches ? 260 : 190,
    marginTop: 22, // the label stands above the highest tick
    y: { label: "images/s, all cards", grid: true, zero: true, ticks: 5 },
    marks: [
      Plot.rectY(bins, { x1: "x1", x2: "x2", y: "value", fill: "var(--generating)", ariaDescription: "images a second", title: (bin) => `${clock(bin.x1)} to ${clock(bin.x2)}: ${rate(bin.value)} images/s` }),
      Plot.ruleY([0]),
      rules(),
    ],
    ariaLabel: "images a second of all cards",
  });
}

function rateByCard(width) {
  const step = data.rates.card_bin_s;
  const cells = data.rates.cards.flatMap(([place, values]) => values.map((value, bin) => ({ card: names[place], x1: bin * step, x2: (bin + 1) * step, value })).filter((cell) => cell.value > 0));
  return Plot.plot({
    ...axes(width),
    height: names.length * rowHeight() * 0.8 + 48,
    y: { domain: names, label: null, padding: 0.1 },
    color: { scheme: "cividis", domain: [0, Math.max(...cells.map((cell) => cell.value), 1e-9)] },
    marks: [
      cardAxis(width),
      Plot.barX(cells, { y: "card", x1: "x1", x2: "x2", fill: "value", shapeRendering: "crispEdges", ariaDescription: "images a second of a card", title: (cell) => `${cell.card}, ${clock(cell.x1)} to ${clock(cell.x2)}: ${rate(cell.value)} images/s` }),
      rules(),
    ],
    ariaLabel: "images a second of each card",
  });
}

function rateLegend() {
  const most = Math.max(...data.rates.cards.flatMap(([, values]) => values), 1e-9);
  const margin = 6; // half of the 0 lies in it
  const tickFormat = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });
  return Plot.legend({ color: { scheme: "cividis", domain: [0, most], label: "images/s of a card" }, tickFormat, marginLeft: margin, width: 220 + margin });
}

const plots = [];
function plot(draw) {
  const box = el("div", { class: "plot" });
  plots.push([box, draw]);
  return box;
}
function redraw() {
  for (const [box, draw] of plots) {
    const width = Math.max(300, box.clientWidth);
    if (box.dataset.width === String(width)) continue;
    box.dataset.width = width;
    box.replaceChildren(draw(width));
  }
}

const seen = kinds.filter((kind) => data.spent[kind] > 0);
const symbol = (kind) => {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const type = { times: d3.symbolTimes, triangle: d3.symbolTriangle, square: d3.symbolSquare, diamond2: d3.symbolDiamond2, circle: d3.symbolCircle }[SYMBOLS[kind]];
  svg.setAttribute("viewBox", "-7 -7 14 14");
  path.setAttribute("d", d3.symbol(type, 60)());
  path.setAttribute("fill", "none");
  path.setAttribute("stroke", "currentColor");
  path.setAttribute("stroke-width", 2);
  svg.append(path);
  return svg;
};
const happened = Object.keys(SYMBOLS).filter((kind) => data.marks.some((mark) => mark[1] === kind));

root.append(
  el("section", { id: "timeline" },
    el("h2", {}, "What each card did"),
    el("ul", { class: "legend" },
      seen.map((kind) => el("li", {}, el("i", { style: `background: ${color(kind)}` }), `${kind}: ${data.kinds[kind]}`)),
      happened.map((kind) => el("li", {}, symbol(kind), MEANINGS[kind])),
    ),
    names.length < data.cards_total ? el("p", { class: "quiet" }, `${names.length} of ${data.cards_total} cards are drawn: those with faults first, then the slowest.`) : null,
    names.length ? plot(timeline) : el("p", {}, "No card has worked yet."),
  ),
  data.rates.all.length && names.length ? el("section", { id: "rates" },
    el("h2", {}, "Images a second"),
    plot(rateOfAll),
    el("div", { class: "plot" }, rateLegend()),
    plot(rateByCard),
  ) : null,
);

// -- where the time went -------------------------------------------------------------------------------------------

const spentTotal = Object.values(data.spent).reduce((sum, value) => sum + value, 0);
if (spentTotal > 0) {
  root.append(el("section", { id: "spent" },
    el("h2", {}, `Where the time went: ${duration(spentTotal)} of all cards`),
    el("div", { class: "split" }, seen.map((kind) => el("div", { style: `width: ${100 * data.spent[kind] / spentTotal}%; background: ${color(kind)}`, title: `${kind}: ${percent(data.spent[kind] / spentTotal)}` }))),
    el("div", { class: "scroll" }, el("table", {},
      el("tr", {}, el("th", {}, "at"), el("th", { class: "number" }, "share"), el("th", { class: "number" }, "time"), el("th", {}, "")),
      seen.map((kind) => el("tr", { "data-kind": kind },
        el("td", {}, el("span", { class: "legend" }, el("span", {}, el("i", { style: `background: ${color(kind)}` }), kind))),
        el("td", { class: "number" }, percent(data.spent[kind] / spentTotal)),
        el("td", { class: "number" }, duration(data.spent[kind])),
        el("td", { class: "text" }, data.kinds[kind]))),
    )),
  ));
}

// -- cards ---------------------------------------------------------------------------------------------------------

const columns = [
  ["card", (card) => card.name, "name"],
  ["images", (card) => number(card.images), "number"],
  ["images/s", (card) => rate(card.images_per_s), "number"],
  ["pace", (card) => card.pace === null ? "-" : card.pace.toFixed(2), "number"],
  ["busy", (card) => percent(card.busy_share), "number"],
  ["warm-up", (card) => duration(card.warmup_s), "number"],
  ["failed rows", (card) => number(card.failed_rows), "number"],
  ["faults", (card) => number(card.faults), "number"],
  data.cards.some((card) => card.joules_per_image) ? ["J an image", (card) => number(card.joules_per_image, 1), "number"] : null,
  data.cards.some((card) => card.watts) ? ["W", (card) => number(card.watts, 0), "number"] : null,
  data.cards.some((card) => card.temperature_c) ? ["max \u00b0C", (card) => number(card.temperature_c, 0), "number"] : null,
  data.cards.some((card) => card.now) ? [data.as_of ? `at ${data.as_of}` : "now", (card) => card.now ?? "", "text"] : null,
  ["", (card) => card.flags.join("; "), "text"],
].filter(Boolean);
if (names.length) {
  root.append(el("section", { id: "cards" },
    el("h2", {}, "Cards"),
    el("p", { class: "quiet" }, "Images/s are of generation, warm-up left out. The pace compares a card's batches with those of the others of the same size: 0.50 is half as fast. Busy is the device's share of the time from its first batch to its last."),
    el("div", { class: "scroll" }, el("table", {},
      el("tr", {}, columns.map(([title, , kind]) => el("th", { class: kind }, title))),
      data.cards.map((card) => el("tr", { class: card.flags.length ? "flagged" : null, "data-card": card.name }, columns.map(([, value, kind]) => el("td", { class: kind }, value(card))))),
    )),
  ));
}

// -- failures ------------------------------------------------------------------------------------------------------

if (data.failures.length) {
  root.append(el("section", { id: "failures" },
    el("h2", {}, "Failed rows by reason"),
    el("div", { class: "scroll" }, el("table", {},
      el("tr", {}, el("th", { class: "number" }, "rows"), el("th", {}, "reason"), el("th", {}, "first ids")),
      data.failures.map((group) => el("tr", {}, el("td", { class: "number" }, number(group.rows)), el("td", { class: "text" }, group.reason), el("td", { class: "text" }, group.first_ids.join(", ")))),
    )),
  ));
}

// -- pictures ------------------------------------------------------------------------------------------------------

function originalOf(picture) {
  if (data.base === null || picture.member) return null;
  const path = picture.path.split("/").map(encodeURIComponent).join("/");
  return data.base ? `${data.base}/${path}` : path;
}
function fact(name, value) {
  return value === null || value === undefined || value === "" ? [] : [el("dt", {}, name), el("dd", {}, value)];
}
const dialog = el("dialog", { click: (event) => { if (event.target === dialog) dialog.close(); } });
function open(picture) {
  const original = originalOf(picture);
  dialog.replaceChildren(
    el("div", { class: "both" },
      el("img", { src: picture.src, alt: picture.prompt ?? "" }),
      el("div", { class: "about" },
        el("p", { class: "prompt" }, picture.prompt ?? ""),
        el("dl", {},
          fact("negative prompt", picture.negative_prompt), fact("id", picture.id), fact("row, image", `${picture.row}, ${picture.image_index}`),
          fact("seed", picture.seed), fact("settings", picture.bucket), fact("card", picture.card),
          fact("not safe for work", picture.nsfw ? "yes" : null), fact("prompt was truncated", picture.truncated ? "yes" : null),
          fact("stored in", picture.member ? `${picture.path}: ${picture.member}` : picture.path),
        ),
        original ? el("p", {}, el("a", { href: original }, "the image as it was made")) : null,
        el("button", { click: () => dialog.close() }, "close"),
      ),
    ),
  );
  dialog.showModal();
}
const optionsOf = (values) => [...new Set(values)].map((value) => el("option", { value }, value));
const searchable = (...texts) => texts.filter((text) => text !== null && text !== undefined).join("\n").toLowerCase();
if (data.pictures.length || data.failed.length) {
  const text = el("input", { type: "search", placeholder: "filter by prompt, id, seed or error", "aria-label": "filter", input: filter });
  const bucket = el("select", { "aria-label": "settings", change: filter }, el("option", { value: "" }, "all settings"), optionsOf(data.pictures.map((picture) => picture.bucket)));
  const card = el("select", { "aria-label": "card", change: filter }, el("option", { value: "" }, "all cards"), optionsOf(data.pictures.map((picture) => picture.card)));
  const count = el("span", { class: "quiet", id: "shown" });
  const tiles = data.pictures.map((picture) => [picture, searchable(picture.prompt, picture.id, picture.negative_prompt, picture.seed), el("li", {},
    el("button", { click: () => open(picture), title: picture.prompt ?? "" },
      el("img", { src: picture.src, alt: picture.prompt ?? "", loading: "lazy" }),
      el("span", {}, picture.prompt ?? "")))]);
  const failed = data.failed.map((row) => [searchable(row.id, row.error), el("tr", {}, el("td", { class: "number" }, row.row), el("td", { class: "text" }, row.id), el("td", { class: "text" }, row.error))]);
  function filter() {
    const wanted = text.value.toLowerCase().trim();
    let shown = 0;
    for (const [picture, words, tile] of tiles) {
      tile.hidden = !(words.includes(wanted) && (!bucket.value || picture.bucket === bucket.value) && (!card.value || picture.card === card.value));
      shown += !tile.hidden;
    }
    for (const [words, row] of failed) row.hidden = !words.includes(wanted);
    count.textContent = `${shown} of ${tiles.length} pictures`;
  }
  root.append(el("section", { id: "pictures" },
    el("h2", {}, data.pictures.length < data.images ? `${number(data.pictures.length)} of the ${number(data.images)} images` : "Images"),
    el("div", { class: "filters" }, text, bucket, card, count),
    el("ul", { class: "gallery" }, tiles.map(([, , tile]) => tile)),
  ));
  if (failed.length) {
    root.append(el("section", { id: "failed" },
      el("h2", {}, failed.length < data.failed_rows ? `The first ${number(failed.length)} of ${number(data.failed_rows)} failed rows` : "Failed rows"),
      el("div", { class: "scroll" }, el("table", {}, el("tr", {}, el("th", { class: "number" }, "row"), el("th", {}, "id"), el("th", {}, "error")), failed.map(([, row]) => row))),
    ));
  }
  root.append(dialog);
  filter();
}

// -- what was asked ------------------------------------------------------------------------------------------------

const command = el("pre", { id: "command" }, data.command);
root.append(el("section", { id: "asked" },
  el("h2", {}, "What was asked"),
  el("dl", {}, Object.entries(data.asked.job).map(([name, value]) => fact(name.replaceAll("_", " "), value))),
  el("h2", {}, "The command that repeats it"),
  el("p", { class: "quiet" }, "It writes beside this run. Credentials are in no record; give them as the run had them."),
  command,
  el("h2", {}, "What made the images"),
  el("dl", {}, Object.entries(data.asked.stack).map(([name, value]) => fact(name, value))),
  data.drivers.some((driver) => driver.started_at) ? el("div", {},
    el("h2", {}, "Drivers"),
    el("div", { class: "scroll" }, el("table", {},
      el("tr", {}, ["driver", "started", "ended", "wall time"].map((title) => el("th", {}, title))),
      data.drivers.map((driver) => el("tr", {}, el("td", {}, driver.driver), el("td", {}, driver.started_at ?? "-"), el("td", {}, driver.ended_at ?? "-"), el("td", {}, duration(driver.stop - driver.start)))),
    )),
    el("p", { class: "quiet" }, "The log of each is in log/ of the output."),
  ) : null,
));

const titles = { timeline: "timeline", rates: "images/s", spent: "time", cards: "cards", failures: "failures", failed: "failed rows", pictures: "pictures", asked: "job" };
document.querySelector("header").append(el("nav", {}, Object.entries(titles).filter(([id]) => document.getElementById(id)).map(([id, title]) => el("a", { href: `#${id}` }, title))));

redraw();
let pending = 0;
new ResizeObserver(() => { cancelAnimationFrame(pending); pending = requestAnimationFrame(redraw); }).observe(page);
document.documentElement.dataset.drawn = "true";
