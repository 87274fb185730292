"use strict";
// The table of examples: filters, order, pages, and marks of what differs from the expected answer.
(() => {
  const LONG = 400; // characters of a text that are shown at once
  const MOST_CELLS = 400000; // of the table in which two texts are compared, word by word
  const ALIKE = 0.2; // share of words in common below which marks would say nothing
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const rows = data.samples.map(([set, row, place, prompt, expected, answers], index) =>
    ({ set, row, place, prompt, expected, answers, index }));
  const form = by("filters"), body = by("rows").tBodies[0];
  const state = { page: 0, sort: "row", model: null, down: false };

  const element = (name, content, properties) => {
    const made = document.createElement(name);
    for (const part of [content].flat()) if (part !== null && part !== undefined) made.append(part);
    for (const [key, value] of Object.entries(properties || {})) made.setAttribute(key, value);
    return made;
  };

  // What a reader can't see, or what changes the direction of the text behind it.
  // Not line breaks, tabs, and what joins letters of some scripts and emoji.
  const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
  const SPLIT = new RegExp(`(${HIDDEN.source})`, "u");
  const NAMED = { 0: "NUL", 7: "BEL", 8: "BS", 13: "CR", 27: "ESC", 127: "DEL" };
  const visible = (text) => {
    if (!HIDDEN.test(text)) return [text];
    return text.split(SPLIT).map((part) => {
      if (!HIDDEN.test(part)) return part;
      const code = part.codePointAt(0), name = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
      return element("span", NAMED[code] || name, { class: "control", title: name });
    });
  };

  const words = (text) => text.match(/[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}_]+|\s+|./gsu) || [];

  // [kind, text] with kind "=" in both, "+" only in the answer, "-" only in the expected one.
  const compare = (expected, answer) => {
    const a = words(expected), b = words(answer);
    let start = 0, end = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start++;
    while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
    const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end);
    const parts = [], add = (kind, text) => {
      const last = parts[parts.length - 1];
      if (last && last[0] === kind) last[1] += text; else if (text) parts.push([kind, text]);
    };
    add("=", a.slice(0, start).join(""));
    if (x.length * y.length > MOST_CELLS || !x.length || !y.length) {
      add("-", x.join("")); add("+", y.join(""));
    } else {
      const width = y.length + 1, table = new Uint32Array((x.length + 1) * width);
      for (let i = x.length - 1; i >= 0; i--)
        for (let j = y.length - 1; j >= 0; j--)
          table[i * width + j] = x[i] === y[j] ? table[(i + 1) * width + j + 1] + 1
            : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      let i = 0, j = 0;
      while (i < x.length && j < y.length) {
        if (x[i] === y[j]) { add("=", x[i]); i++; j++; }
        else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) add("-", x[i++]);
        else add("+", y[j++]);
      }
      add("-", x.slice(i).join("")); add("+", y.slice(j).join(""));
    }
    add("=", a.slice(a.length - end).join(""));
    return parts;
  };
  const letters = (parts, kinds) => parts.filter(([kind]) => kinds.includes(kind)).map(([, text]) => text.replace(/\s+/g, "")).join("").length;

  const NAMES = { "+": "ins", "-": "del" };
  const fill = (target, parts, all) => {
    let left = all ? Infinity : LONG;
    for (const [kind, text] of parts) {
      if (left <= 0) break;
      const shown = visible(text.length > left ? text.slice(0, left + /[\ud800-\udbff]$/.test(text.slice(0, left))) : text);
      left -= text.length;
      if (kind === "=") target.append(...shown); else target.append(element(NAMES[kind], shown));
    }
  };
  const textBlock = (parts) => {
    const block = element("div", null, { class: "text", dir: "auto" });
    const length = parts.reduce((sum, [, text]) => sum + text.length, 0);
    fill(block, parts, false);
    if (length <= LONG) return [block];
    block.append(" …");
    const button = element("button", `show all (${length.toLocaleString("en")} characters)`, { type: "button", class: "more", "aria-expanded": "false" });
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      block.replaceChildren();
      fill(block, parts, open);
      if (!open) block.append(" …");
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "show less" : `show all (${length.toLocaleString("en")} characters)`;
    });
    return [block, button];
  };

  const metricOf = (set, name) => (data.metrics[set] || []).find((metric) => metric.name === name);
  const inUnit = (metric, value) => {
    const unit = metric ? metric.unit : "number";
    if (unit === "share") return (100 * value).toFixed(1) + "%";
    const text = value !== 0 && Math.abs(value) < 5e-5 ? value.toExponential(1) : value.toFixed(unit === "tokens" ? 1 : 4);
    return (unit === "seconds" ? value.toFixed(2) + " s" : text).replace(/^-/, "−");
  };

  const answerCell = (row, name) => {
    const cell = element("td", null, { "data-label": name });
    const answer = row.answers[name];
    const given = answer && (answer.text ?? answer.chosen);
    if (given === undefined || given === null) cell.append(element("span", "no answer", { class: "aside" }));
    else if (given === row.expected) cell.append(...textBlock([["=", given]]), element("span", "✓ as expected", { class: "tag right" }));
    else {
      let parts = [["=", given]], note = null;
      if (by("filter-marks").checked && row.expected) {
        const marked = compare(row.expected, given);
        const common = 2 * letters(marked, "=") / Math.max(1, 2 * letters(marked, "=") + letters(marked, "+-"));
        if (common >= ALIKE) parts = marked; else note = "differs throughout";
        if (!given) parts = marked;
      }
      cell.append(...textBlock(parts));
      if (given === "") cell.append(element("span", "empty", { class: "tag" }));
      else if (note) cell.append(element("span", note, { class: "tag" }));
    }
    if (!answer) return cell;
    if (answer.text !== undefined && answer.chosen !== undefined) cell.append(element("span", ["option: ", ...visible(answer.chosen)], { class: "tag" }));
    if (answer.ended === false) cell.append(element("span", "not ended", { class: "tag alert" }));
    const scores = Object.entries(answer.scores);
    if (scores.length) {
      const items = scores.map(([key, value]) => {
        const metric = metricOf(row.set, key);
        return element("li", `${metric ? metric.label : key} ${inUnit(metric, value)}`);
      });
      cell.append(element("details", [element("summary", "scores"), element("ul", items)]));
    }
    return cell;
  };
  const rowOf = (row) => element("tr", [
    element("th", [element("span", row.set, { class: "set-name" }), ` ${row.row}`, element("small", visible(row.place.split(/[\\/]/).pop()), { title: row.place })], { scope: "row" }),
    element("td", textBlock([["=", row.prompt]]), { "data-label": "Prompt" }),
    element("td", textBlock([["=", row.expected]]), { "data-label": "Expected" }),
    ...data.models.map((name) => answerCell(row, name)),
  ]);

  // Filters.
  const given = (answer) => (answer ? answer.text ?? answer.chosen : undefined);
  const differ = (row) => new Set(data.models.map((name) => given(row.answers[name])).filter((text) => text !== undefined)).size > 1;
  const gain = (row) => {
    const [model, against] = data.pairs[by("filter-pair").value] || [];
    const name = by("filter-metric").value;
    const [one, other] = [model, against].map((key) => row.answers[key]?.scores[name]);
    if (one === undefined || other === undefined) return 0;
    return metricOf(row.set, name)?.better === "lower" ? other - one : one - other;
  };
  const KINDS = {
    "": () => true,
    differ,
    wins: (row) => gain(row) > 1e-12,
    losses: (row) => gain(row) < -1e-12,
    unended: (row) => data.models.some((name) => row.answers[name]?.ended === false),
  };
  const lower = (row) => (row.lower ??= [row.prompt, row.expected, ...data.models.map((name) => given(row.answers[name]) ?? "")].join("\n").toLowerCase());
  const KEYS = {
    row: (row) => row.index,
    prompt: (row) => row.prompt,
    expected: (row) => row.expected,
    model: (row) => row.answers[state.model]?.scores[by("filter-metric").value],
  };

  const chosen = () => {
    const set = by("filter-set").value, keep = KINDS[by("filter-kind").value], text = by("filter-text").value.toLowerCase();
    const found = rows.filter((row) => (!set || row.set === set) && keep(row) && (!text || lower(row).includes(text)));
    const key = KEYS[state.sort], sign = state.down ? -1 : 1;
    return found.map((row) => [key(row), row]).sort(([a, x], [b, y]) => {
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || x.index - y.index; // none: last
      return sign * (a < b ? -1 : a > b ? 1 : 0) || x.index - y.index;
    }).map(([, row]) => row);
  };
  const show = () => {
    const found = chosen(), pages = Math.max(1, Math.ceil(found.length / data.shown));
    state.page = Math.min(state.page, pages - 1);
    const from = state.page * data.shown, part = found.slice(from, from + data.shown);
    body.replaceChildren(...part.map(rowOf));
    by("shown").textContent = found.length === 0 ? "No row is like this."
      : `Rows ${(from + 1).toLocaleString("en")} to ${(from + part.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}`
        + (found.length < rows.length ? `, chosen from ${rows.length.toLocaleString("en")}` : "");
    by("pager").hidden = pages === 1;
    by("page-at").textContent = `Page ${state.page + 1} of ${pages}`;
    by("page-before").disabled = state.page === 0;
    by("page-next").disabled = state.page === pages - 1;
  };

  const start = () => {
    const names = new Map();
    for (const row of rows) for (const answer of Object.values(row.answers)) for (const name of Object.keys(answer.scores))
      if (!names.has(name)) names.set(name, metricOf(row.set, name)?.label ?? name);
    by("filter-metric").append(...[...names].map(([name, label]) => element("option", label, { value: name })));
    for (const name of ["exact_match", "accuracy"]) if (names.has(name)) { by("filter-metric").value = name; break; }
    by("filter-pair").append(...data.pairs.map(([model, against], index) => element("option", `${model} against ${against}`, { value: index })));
    for (const heading of by("rows").tHead.rows[0].cells) {
      const button = element("button", heading.textContent, { type: "button" });
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const { sort, model } = heading.dataset;
        state.down = state.sort === sort && state.model === (model ?? null) && !state.down;
        Object.assign(state, { sort, model: model ?? null, page: 0 });
        for (const other of by("rows").tHead.rows[0].cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        show();
      });
    }
    form.addEventListener("input", () => { state.page = 0; show(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    const turn = (by_) => { state.page += by_; show(); by("examples").scrollIntoView(); };
    by("page-before").addEventListener("click", () => turn(-1));
    by("page-next").addEventListener("click", () => turn(1));
    form.hidden = false;
    show();
  };
  start();
})();
